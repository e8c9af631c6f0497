"""Every way to an end leaves no process: a stop, a stop during the start, the death of the supervisor, its own hang."""

from __future__ import annotations

import time

import pytest

from tests.system.container import wait_for
from tests.system.host import Host

pytestmark = pytest.mark.system


def _gone(host: Host, pids: dict[int, str], timeout_s: float) -> None:
    assert pids, "the engine must have had processes"
    wait_for(lambda: pids.keys().isdisjoint(host.container.processes("vllmd")), timeout_s, f"the end of {pids}")


@pytest.mark.parametrize("stray", ["", "setsid,fork,rename,ignore,env"])
def test_stop_leaves_no_process(host: Host, stray: str) -> None:
    name = host.instance("stops", env={"FAKE_STRAY": stray} if stray else {})
    host.start(name)
    assert len(host.engine(name)) >= 3
    host.stop(name)
    assert host.container.processes("vllmd") == {}
    unit = host.unit(name)
    assert (unit["ActiveState"], *unit.status) == ("inactive", "success", 0)
    assert host.state(name, "last")["error"] is None


def test_stop_during_the_start_ends_an_engine_that_loses_sigterm(host: Host) -> None:
    name = host.instance("early", env={"FAKE_START_S": 300, "FAKE_SIGTERM_STARTING": "wedge"}, stop={"start_grace_s": 1})
    host.run("systemctl", "start", "--no-block", f"vllmd@{name}")
    wait_for(lambda: len(host.engine(name)) >= 2, 20, "the engine's processes")
    began = time.monotonic()
    host.stop(name)
    assert time.monotonic() - began < 10
    assert host.container.processes("vllmd") == {}
    assert host.unit(name).status == ("success", 0)


def test_stop_longer_than_its_timeout_keeps_its_own_status(host: Host) -> None:
    """An engine that ignores SIGTERM is killed at shutdown_timeout + 10 s: by us, not by systemd."""
    env = {"FAKE_SIGTERM": "ignore"}
    name = host.instance("slow", env=env, stop={"shutdown_timeout_s": 0}, dropin="TimeoutStopSec=3")
    host.start(name)
    began = time.monotonic()
    host.stop(name)
    assert 3 < time.monotonic() - began < 25
    assert host.unit(name).status == ("success", 0)
    assert host.container.processes("vllmd") == {}


def test_sigkill_of_the_supervisor_leaves_no_process_and_it_serves_again(host: Host) -> None:
    name = host.instance("orphans", env={"FAKE_STRAY": "setsid,fork,ignore"}, dropin="RestartSec=1")
    host.start(name)
    before = host.engine(name)
    host.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", f"vllmd@{name}")
    _gone(host, before, 5)
    host.wait_unit(name, 30, ActiveState="active", NRestarts="1")
    assert host.health(name) == 200


def test_sigkill_of_the_supervisor_leaves_no_process_even_if_nobody_starts_it_again(host: Host) -> None:
    name = host.instance("alone", env={"FAKE_STRAY": "setsid,fork,ignore"}, dropin="Restart=no")
    host.start(name)
    before = host.engine(name)
    host.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", f"vllmd@{name}")
    _gone(host, before, 5)
    host.start(name)
    assert host.health(name) == 200


def test_sigkill_of_the_engine_s_main_process_takes_the_rest_along(host: Host) -> None:
    """A plain unit leaves EngineCore and its workers behind, holding the GPU's memory."""
    name = host.instance("beheaded", dropin="RestartSec=1")
    host.start(name)
    before = host.engine(name)
    pid = host.state(name)["engine"]["pid"]
    assert pid in before
    host.shell(f"kill -KILL {pid}")
    _gone(host, before, 10)
    host.wait_unit(name, 30, ActiveState="active", NRestarts="1")
    assert host.state(name, "last")["error"]["status"] == 70


def test_hang_of_the_supervisor_is_ended_by_the_watchdog(host: Host) -> None:
    name = host.instance("hangs", dropin="WatchdogSec=2\nTimeoutAbortSec=1\nRestartSec=1")
    host.start(name)
    before = host.engine(name)
    host.shell(f"kill -STOP {host.unit(name).main_pid}")
    _gone(host, before, 15)
    host.wait_unit(name, 30, ActiveState="active", NRestarts="1")
    assert "Failed with result 'watchdog'" in host.log(name)
    assert host.health(name) == 200


def test_watchdog_leaves_a_healthy_instance_alone(host: Host) -> None:
    name = host.instance("watched", dropin="WatchdogSec=1")
    host.start(name)
    main = host.unit(name).main_pid
    entered = int(host.unit(name)["ActiveEnterTimestampMonotonic"])
    last_ping = wait_for(lambda: _pinged_after(host, name, entered + 4_000_000), 15, "watchdog pings for 4 s")
    assert last_ping
    assert host.unit(name).main_pid == main


def _pinged_after(host: Host, name: str, monotonic_us: int) -> bool:
    return int(host.unit(name)["WatchdogTimestampMonotonic"]) > monotonic_us
