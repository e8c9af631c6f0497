"""`systemctl start` under a real systemd: it returns when the model answers, and a failure has its documented status."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.system.host import MODEL, Host

pytestmark = pytest.mark.system


def test_start_blocks_until_the_model_answers(host: Host) -> None:
    name = host.instance("blocks", env={"FAKE_START_S": 3})
    began = time.monotonic()
    host.start(name)
    assert host.health(name) == 200
    assert time.monotonic() - began >= 3
    unit = host.unit(name)
    assert (unit["ActiveState"], unit["StatusText"]) == ("active", host.unit(name)["StatusText"])
    assert f"http://127.0.0.1:{host.port(name)}" in unit["StatusText"]
    assert host.state(name)["state"] == "ready"


def test_start_far_longer_than_its_timeout_succeeds_while_it_makes_progress(host: Host) -> None:
    name = host.instance("long", env={"FAKE_START_S": 14}, start={"stall_timeout_s": 6}, dropin="TimeoutStartSec=3")
    began = time.monotonic()
    host.start(name)
    assert time.monotonic() - began >= 14
    assert host.unit(name)["ActiveState"] == "active"
    assert host.unit(name)["NRestarts"] == "0"


@pytest.mark.parametrize("moves", ["cpu", "lines", "none"])
def test_start_that_gets_nowhere_ends_with_75(host: Host, moves: str) -> None:
    """Burning CPU, or a line now and then, stretches the patience to three times its length, and no further."""
    env = {"FAKE_START_S": 600, "FAKE_PROGRESS": moves, "FAKE_LINE_S": 1}
    name = host.instance("stalls", env=env, start={"stall_timeout_s": 2}, dropin="TimeoutStartSec=3")
    began = time.monotonic()
    assert host.start(name, check=False).status != 0
    assert time.monotonic() - began < 20
    assert host.unit(name).status == ("exit-code", 75)
    assert host.unit(name)["SubState"] == "auto-restart"
    assert "progress" in host.state(name, "last")["error"]["what"]
    assert host.container.processes("vllmd") == {}


def test_start_deadline_ends_a_start_that_moves_for_ever(host: Host) -> None:
    name = host.instance("endless", env={"FAKE_START_S": 600}, start={"start_timeout_s": 4})
    assert host.start(name, check=False).status != 0
    assert host.unit(name).status == ("exit-code", 75)


def _broken_model(host: Host) -> str:
    broken = "/var/lib/vllmd/models/broken"
    host.shell(f"rm -rf {broken}; cp -R {MODEL} {broken}; truncate -s -100 {broken}/*00002*.safetensors; chown -R vllmd: {broken}")
    return broken


def _failing(host: Host, why: str) -> dict[str, Any]:
    """What an instance is given so that it fails for this reason."""
    match why:
        case "unknown key":
            return {"serve": {"prot": 1}}
        case "bad value":
            return {"serve": {"port": 70000}}
        case "invalid model":
            return {"model": _broken_model(host)}
        case "no such model":
            return {"model": {"id": "nobody/nothing", "sources": ["local"]}}
        case _:
            return {"env": {"FAKE_EXIT": "3@0.1", "FAKE_ERROR": "CUDA out of luck"}}


@pytest.mark.parametrize(
    ("why", "status", "restarts"),
    [
        ("unknown key", 78, False),
        ("bad value", 78, False),
        ("invalid model", 65, False),
        ("no such model", 66, True),
        ("engine dies", 70, True),
    ],
)
def test_failure_has_its_documented_status_and_restarts_only_where_that_helps(host: Host, why: str, status: int, restarts: bool) -> None:
    name = host.instance("fails", **_failing(host, why))
    assert host.start(name, check=False).status != 0
    unit = host.unit(name)
    assert unit.status == ("exit-code", status), host.log(name)
    assert unit["SubState"] == ("auto-restart" if restarts else "failed")
    assert unit["NRestarts"] == "0"
    error = host.state(name, "last")["error"]
    assert error["status"] == status
    assert error["what"]
    assert error["hint"]


def test_restart_helps_an_engine_that_died_once(host: Host) -> None:
    name = host.instance("flaky", env={"FAKE_FAIL_FIRST": "1:/var/lib/vllmd/flaky-count"}, dropin="RestartSec=1")
    try:
        host.start(name, check=False)
        host.wait_unit(name, 30, ActiveState="active", NRestarts="1")
        assert host.health(name) == 200
    finally:
        host.shell("rm -f /var/lib/vllmd/flaky-count")


def test_no_model_selected_is_ready_and_says_what_to_do(host: Host) -> None:
    name = host.instance("empty", model={})
    host.start(name)
    assert host.state(name)["state"] == "unconfigured"
    assert "No model" in host.unit(name)["StatusText"]
    assert host.engine(name) == {}


def test_vllmctl_start_returns_ready_and_the_failure_s_reason(host: Host) -> None:
    name = host.instance("fronted", env={"FAKE_START_S": 2})
    done = host.run("vllmctl", "start", name)
    assert f"{name} is ready" in done.out
    assert "starting" in done.err or "load" in done.err.lower(), "phases are shown while it starts"
    assert host.run("vllmctl", "status", name).out.splitlines()[0].startswith(f"● {name}  ready")
    assert f"{name} stopped" in host.run("vllmctl", "stop", name).out
    host.instance(name, serve={"prot": 1})
    failed = host.run("vllmctl", "start", name, check=False)
    assert failed.status == 78
    assert failed.err.splitlines()[-2].startswith(f"vllmctl: {name} did not start: ")
    assert "prot" in failed.err
    assert failed.err.splitlines()[-1].startswith("  hint: ")


def test_reload_reaches_the_supervisor_without_procps(host: Host) -> None:
    name = host.instance("reloads")
    host.start(name)
    assert host.run("sh", "-c", "command -v ps", check=False).status != 0, "the container must not have procps"
    before = host.unit(name).main_pid
    host.run("systemctl", "reload", f"vllmd@{name}")
    assert host.unit(name).main_pid == before
    assert host.health(name) == 200
