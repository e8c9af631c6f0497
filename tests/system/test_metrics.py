"""Metrics out of the real unit's sandbox: an address, and a textfile where only the service may write."""

from __future__ import annotations

from typing import Any

import pytest

from tests.system.container import wait_for
from tests.system.host import Host

pytestmark = pytest.mark.system

def complaints(host: Host, name: str) -> list[dict[str, Any]]:
    return [entry for entry in host.entries(name) if entry.get("VLLMD_EVENT") == "metrics-unavailable"]


ASK = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:19108/metrics').read().decode())"


def test_address_and_textfile_work_in_the_sandbox(host: Host) -> None:
    name = host.instance("figures", metrics={"listen": "127.0.0.1:19108", "textfile": "/run/vllmd/metrics", "interval_s": 0.2})
    host.start(name)
    told = host.run("python3", "-c", ASK).out
    assert f'vllmd_ready{{name="{name}"}} 1.0' in told
    path = f"/run/vllmd/metrics/vllmd-{name}.prom"
    wait_for(lambda: f'vllmd_ready{{name="{name}"}} 1.0' in host.run("cat", path, check=False).out, 20, "ready in the file")
    assert host.run("stat", "-c", "%U %a", path).out.split() == ["vllmd", "644"]
    assert not complaints(host, name)
    host.stop(name)
    assert host.run("ls", "-A", "/run/vllmd/metrics").out == ""


def test_a_directory_that_is_not_the_service_s_is_said_with_what_to_do(host: Host) -> None:
    name = host.instance("forbidden", metrics={"textfile": "/usr/local/share/vllmd"})
    host.start(name)
    (entry,) = wait_for(lambda: complaints(host, name), 20, "the complaint")
    assert "Read-only file system" in entry["MESSAGE"]
    assert "ReadWritePaths=" in entry["VLLMD_HINT"]
    shown = host.run("journalctl", "-x", "--no-pager", "-u", f"vllmd@{name}").out
    assert "cannot publish its metrics" in shown
    assert "systemctl reload vllmd@forbidden.service" in shown
    host.stop(name)
