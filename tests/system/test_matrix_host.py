"""The host's rows of the fault matrix, under a real systemd: a journal that is away, and restarts without end."""

from __future__ import annotations

import re
import time

import pytest

from tests.matrix import measured
from tests.system.container import wait_for
from tests.system.host import Host

pytestmark = [pytest.mark.system, pytest.mark.matrix]

JOURNAL = ("systemd-journald.socket", "systemd-journald-dev-log.socket", "systemd-journald.service")
MANY = "StartLimitIntervalSec=0"


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_journal_that_is_away_delays_no_verdict_and_gets_what_comes_later(host: Host, how: str) -> None:
    """The usual bindings block after some hundred messages, and the daemon with them."""
    env = {"FAKE_OUTPUT": "flood"}
    name = host.instance("unheard", env=env, log={"lines_per_s": 2000}, dropin="RestartSec=1\nWatchdogSec=3")
    host.start(name)
    before, main = host.engine(name), host.unit(name).main_pid
    with measured(f"journald {how} under a flood: SIGKILL of the engine", 3.0) as row:
        try:
            if how == "stopped":
                host.run("systemctl", "stop", *JOURNAL)
            else:
                host.run("systemctl", "kill", "--signal=KILL", "systemd-journald.service")
            time.sleep(2)  # some thousand lines, and more than half of the watchdog's patience
            assert host.health(name) == 200
            assert host.unit(name).main_pid == main
            pid = host.state(name)["engine"]["pid"]
            began = time.monotonic()
            host.shell(f"kill -KILL {pid}")
            wait_for(lambda: before.keys().isdisjoint(host.container.processes("vllmd")), 10, "the end of the engine", 0.02)
            row.verdict_s = row.empty_s = time.monotonic() - began
        finally:
            host.run("systemctl", "start", *JOURNAL)
        host.wait_unit(name, 30, ActiveState="active", NRestarts="1")
        error = host.state(name, "last")["error"]
        row.said = f"{error['status']} {error['code']}"
        assert error["status"] == 70
        main = host.unit(name).main_pid
        wait_for(lambda: "Serving" in _journal(host, f"_PID={main}", "VLLMD_EVENT=engine-ready"), 30, "the new life's entries", 0.5)


def _journal(host: Host, *matches: str) -> str:
    """Only what matches: the flood fills the rest."""
    host.run("journalctl", "--sync")
    return host.run("journalctl", "--no-pager", "-o", "cat", *matches).out


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
def test_restarts_in_a_row_leave_nothing_that_adds_up(host: Host, count: int) -> None:
    name = host.instance("again", env={"FAKE_STRAY": "setsid,fork,ignore", "FAKE_SPEED": "4"}, dropin="RestartSec=100ms\n[Unit]\n" + MANY)
    host.start(name)
    with measured(f"{count} restarts in a row") as row:
        _fail(host, name, 1)
        first = _grows(host, name)
        for number in range(2, count + 1):
            _fail(host, name, number)
        last = _grows(host, name)
        row.said = ", ".join(f"{key} {first[key]} -> {last[key]}" for key in first)
        assert last["groups"] == first["groups"]
        assert last["descriptors of PID 1"] <= first["descriptors of PID 1"] + 2
        assert last["descriptors"] == first["descriptors"]
        assert last["files"] - first["files"] <= 10 * 15, "the newest ten incidents are kept"
        assert last["KiB of the supervisor"] - first["KiB of the supervisor"] < 4096


def _fail(host: Host, name: str, restarts: int) -> None:
    pid = host.state(name)["engine"]["pid"]
    host.shell(f"kill -KILL {pid}")
    host.wait_unit(name, 60, ActiveState="active", SubState="running", NRestarts=str(restarts))


def _grows(host: Host, name: str) -> dict[str, int]:
    script = f"""
    pid=$(systemctl show -p MainPID --value vllmd@{name})
    echo groups $(find /sys/fs/cgroup -type d -path '*vllmd@{name}*' | wc -l)
    echo files $(find /run/vllmd /var/lib/vllmd/instances/{name} /var/cache/vllmd | wc -l)
    echo descriptors of PID 1 $(ls /proc/1/fd | wc -l)
    echo descriptors $(ls /proc/$pid/fd | wc -l)
    echo KiB of the supervisor $(sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/$pid/status)
    """
    lines = host.shell(script).out.splitlines()
    return {match[1]: int(match[2]) for line in lines if (match := re.fullmatch(r"(.*) (\d+)", line))}
