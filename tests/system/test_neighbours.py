"""An instance among others: a port that somebody holds, a journal that is down, litter in /dev/shm."""

from __future__ import annotations

import pytest

from tests.system.container import wait_for
from tests.system.host import Host

pytestmark = pytest.mark.system

JOURNALD = "systemd-journald.socket systemd-journald-dev-log.socket systemd-journald-audit.socket systemd-journald.service"


def test_two_instances_on_one_port_do_not_kill_each_other(host: Host) -> None:
    first = host.instance("first")
    host.start(first)
    engine, main = host.engine(first), host.unit(first).main_pid
    second = host.instance("second", serve={"port": host.port(first)}, preflight={"reclaim": "stray"})
    assert host.start(second, check=False).status != 0
    assert host.unit(second).status == ("exit-code", 2)
    assert host.unit(second)["SubState"] == "failed"
    assert "vllmd@first.service" in str(host.state(second, "last")["error"])
    assert host.engine(first) == engine
    assert host.unit(first).main_pid == main
    assert host.health(first) == 200


def test_a_foreign_listener_is_named_and_left_alone(host: Host) -> None:
    name = host.instance("refused")
    port = str(host.port(name))
    host.run("systemd-run", "--unit=squatter", "python3", "-m", "http.server", "--bind", "127.0.0.1", port)
    try:
        probe = f"import socket; socket.create_connection(('127.0.0.1', {port})).close()"
        wait_for(lambda: host.run("python3", "-c", probe, check=False).status == 0, 20, "the squatter's listener")
        assert host.start(name, check=False).status != 0
        assert host.unit(name).status == ("exit-code", 2)
        assert "squatter.service" in str(host.state(name, "last")["error"])
        assert host.run("systemctl", "is-active", "squatter", check=False).out.strip() == "active"
    finally:
        host.run("systemctl", "stop", "squatter", check=False)


def test_300_mb_fit_into_dev_shm_of_the_service_s_user_and_vanish_with_it(host: Host) -> None:
    name = host.instance("litters", env={"FAKE_SHM_MB": 300})
    host.start(name)
    main = str(host.unit(name).main_pid)
    used = host.run("nsenter", "-t", main, "-m", "--", "df", "--output=used", "-BM", "/dev/shm").out.split()[-1]
    assert int(used.removesuffix("M")) >= 300
    mode = host.run("nsenter", "-t", main, "-m", "--", "stat", "-c", "%a", "/dev/shm").out.strip()
    assert mode == "1777"
    assert list(host.container.path("/dev/shm").iterdir()) == [], "the host's own stays clean"
    host.stop(name)


def test_journald_stopped_harms_nothing(host: Host) -> None:
    name = host.instance("unheard", env={"FAKE_OUTPUT": "flood", "FAKE_OUTPUT_MB": 30, "FAKE_START_S": 2}, dropin="WatchdogSec=3")
    host.run("systemctl", "stop", *JOURNALD.split())
    try:
        host.start(name)
        main = host.unit(name).main_pid
        entered = int(host.unit(name)["ActiveEnterTimestampMonotonic"])
        wait_for(lambda: int(host.unit(name)["WatchdogTimestampMonotonic"]) > entered + 4_000_000, 20, "the supervisor's pings")
        assert host.health(name) == 200
        assert host.unit(name).main_pid == main
    finally:
        host.run("systemctl", "start", *JOURNALD.split())
    wait_for(lambda: any(each.get("VLLMD_EVENT") == "lines-dropped" for each in host.entries(name)), 20, "a word about what was lost")
    host.stop(name)
    assert host.unit(name).status == ("success", 0)
