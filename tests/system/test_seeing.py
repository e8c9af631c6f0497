"""What people and load balancers see of real units: also without any permission, and when the supervisor was killed."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.json_docs import differences
from tests.system.container import wait_for
from tests.system.host import Host

pytestmark = pytest.mark.system

ASK = """
import sys, urllib.request as r
headers = {"Content-Type": "application/json", **dict([sys.argv[2].split(": ", 1)])}
print(r.urlopen(r.Request(sys.argv[1], sys.argv[3].encode(), headers), timeout=30).read().decode())
"""
"""The curl, where there is none: its address, its key, its body."""
NOBODY = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups")


def test_a_life_as_it_is_seen(host: Host) -> None:
    name = host.instance("seen")
    assert host.run(*NOBODY, "vllmctl", "health", name, check=False).status == 1, "it does not run yet"
    said = host.run("vllmctl", "start", name).out.splitlines()
    assert f"{name} is ready after" in said[-2]
    key = host.run("vllmctl", "api-key", "show", name).out.strip()
    words = shlex.split(said[-1].removeprefix("try: ").replace(f"$(vllmctl api-key show {name})", key))
    assert "choices" in json.loads(host.run("python3", "-c", ASK, *(words[index] for index in (1, 3, 7))).out)

    assert host.run(*NOBODY, "vllmctl", "health", name).out == "The vLLM API is ready\n"
    seen = json.loads(host.run(*NOBODY, "vllmctl", "top", "--json").out)
    assert differences("vllmctl top --json", seen) == []
    assert [(each["state"], each["running"], each["restarts"]) for each in seen["instances"] if each["name"] == name] == [("ready", 0, 0)]
    assert f" {name} " in host.run("vllmctl", "top", "--once").out

    host.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", f"vllmd@{name}")
    wait_for(lambda: host.run("vllmctl", "health", name, check=False).status == 1, 30, "seen to be gone")
    wait_for(lambda: host.run("vllmctl", "health", name, check=False).status == 0, 120, "ready again")
    again = json.loads(host.run("vllmctl", "top", "--json").out)
    assert [each["restarts"] for each in again["instances"] if each["name"] == name] == [1]
    host.stop(name)
    assert host.run("vllmctl", "health", name, check=False).status == 1


def test_events_are_told_in_order_and_as_documented(host: Host) -> None:
    name = host.instance("eventful")
    assert json.loads(host.run("vllmctl", "start", name, "--json").out)["unit"] == "active"
    assert json.loads(host.run("vllmctl", "stop", name, "--json").out)["unit"] == "inactive"
    told = [json.loads(line) for line in host.run("vllmctl", "events", name, "--json", "-n", "all").out.splitlines()]
    assert [difference for each in told for difference in differences("vllmctl events [NAME] --json", each)] == []
    assert {each["instance"] for each in told} == {name}
    order = [each["event"] for each in told if each["event"] in ("starting", "engine-ready", "stopped")]
    assert order == ["starting", "engine-ready", "stopped"]
    lines = host.run("vllmctl", "events", name, "-n", "1").out.splitlines()
    assert len(lines) == 1
    assert f" {name} " in lines[0]
    assert f" {name} " in host.run("vllmctl", "events", "--since", "1 hour ago").out
    assert json.loads(host.run("vllmctl", "logs", name, "--json", "-n", "1").out)["MESSAGE"]
