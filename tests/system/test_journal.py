"""What an operator finds in the journal: fields to select by, kinds of events, explanations, the engine's own lines."""

from __future__ import annotations

import re

import pytest

from tests.system.container import wait_for
from tests.system.host import Host
from vllmd.system.messages import MESSAGES

pytestmark = pytest.mark.system


def test_fields_of_a_whole_life_are_as_documented(host: Host) -> None:
    name = host.instance("told")
    host.start(name)
    launch = host.state(name)["launch_id"]
    host.stop(name)
    entries = host.entries(name)
    events = [entry for entry in entries if "VLLMD_EVENT" in entry]
    order = [entry["VLLMD_EVENT"] for entry in events]
    wanted = ["starting", "engine-spawned", "engine-ready", "stopping", "stopped"]
    assert [each for each in order if each in wanted] == wanted
    for entry in events:
        assert re.fullmatch("[0-9a-f]{32}", entry["MESSAGE_ID"])
        assert entry["MESSAGE_ID"] == MESSAGES[entry["VLLMD_EVENT"]].id
        assert entry["_SYSTEMD_UNIT"] == f"vllmd@{name}.service"
        assert entry["SYSLOG_IDENTIFIER"] == "vllmd"
    assert launch
    assert {entry.get("VLLMD_LAUNCH") for entry in events if entry["VLLMD_EVENT"] in wanted[1:3]} == {launch}
    assert {entry["VLLMD_PHASE"] for entry in events if entry["VLLMD_EVENT"] == "phase"}


def test_engine_s_lines_have_their_level_and_are_told_apart(host: Host) -> None:
    name = host.instance("lines", env={"FAKE_EXIT": "3@0.2", "FAKE_ERROR": "CUDA out of luck"})
    host.start(name, check=False)
    entries = host.entries(name)
    lines = [entry for entry in entries if entry["SYSLOG_IDENTIFIER"] == "vllmd-engine"]
    (error,) = [entry for entry in lines if "CUDA out of luck" in entry["MESSAGE"]]
    assert error["PRIORITY"] == "3"
    assert {entry["PRIORITY"] for entry in lines} > {"3"}
    shown = host.run("vllmctl", "logs", name, "--engine", "-n", "all", "-o", "cat").out
    assert "CUDA out of luck" in shown
    events = host.run("vllmctl", "logs", name, "--events", "-n", "all", "-o", "cat").out
    assert "CUDA out of luck" not in events.splitlines()
    assert events


def test_catalog_explains_events(host: Host) -> None:
    name = host.instance("explained")
    host.start(name)
    host.run("journalctl", "--sync")
    shown = host.run("journalctl", "-x", "--no-pager", "-u", f"vllmd@{name}").out
    assert f"Subject: Instance {name} serves its model" in shown


def test_flood_does_not_hide_the_supervisor_s_own_events(host: Host) -> None:
    name = host.instance("floods", env={"FAKE_OUTPUT": "flood", "FAKE_OUTPUT_MB": 20, "FAKE_START_S": 2}, log={"lines_per_s": 50})
    host.start(name)
    host.stop(name)
    events = {entry.get("VLLMD_EVENT") for entry in host.entries(name)}
    assert {"engine-ready", "stopped"} <= events
    assert wait_for(lambda: "lines-dropped" in {each.get("VLLMD_EVENT") for each in host.entries(name)}, 5, "a count of what was dropped")


def test_secrets_come_as_credentials_and_show_up_nowhere(host: Host) -> None:
    secret = "sk-test-9b1f6c2e"
    name = host.instance("keyed")
    host.container.write(f"/etc/credstore/vllmd.{name}.api-key", secret, 0o600)
    try:
        host.start(name)
        assert host.health(name) == 200
        assert host.shell("cat /proc/[0-9]*/cmdline", check=False).out.count(secret) == 0
        host.stop(name)
        assert secret not in host.run("journalctl", "-o", "json", "--all", f"_SYSTEMD_UNIT=vllmd@{name}.service").out
    finally:
        host.run("rm", "-f", f"/etc/credstore/vllmd.{name}.api-key")
