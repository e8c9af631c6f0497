"""`vllmctl health` and `events`, and what an engine works at: out of files, journal entries and readings."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from vllmd import ctl
from vllmd.config.paths import root_paths
from vllmd.core.load import Load, load_of
from vllmd.core.pulse import Rank, Sample
from vllmd.ctl import alive, control, events
from vllmd.errors import UsageError

pytestmark = pytest.mark.unit

ERROR = {"code": "port_in_use", "what": "port 8000 is held by nginx.service", "hint": "systemctl stop nginx", "status": 2}
TIMEOUT = {"code": "start_timeout", "what": "the engine did not come up within 35 minutes", "hint": "x", "status": 75}


@contextlib.contextmanager
def supervised(root: Path, said: dict[str, Any] | None, last: Any = None, *, listens: bool = True) -> Iterator[list[str]]:
    """An instance as its supervisor left it, whose control socket answers or not; the arguments for its root."""
    paths = root_paths(root)
    paths.instance_runtime("demo").mkdir(parents=True)
    paths.instance_state("demo").mkdir(parents=True)
    paths.config.mkdir()
    paths.instance_config("demo").write_text("model: x\n")
    if said is not None:
        (paths.instance_runtime("demo") / "status.json").write_text(json.dumps(said))
    if last is not None:
        (paths.instance_state("demo") / "last.json").write_text(json.dumps({"error": last}))
    with socket.socket(socket.AF_UNIX) as control:
        if listens:
            control.bind(str(paths.instance_runtime("demo") / "control.sock"))
            control.listen()
        yield ["--root", str(root)]


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        yield f"http://127.0.0.1:{found.getsockname()[1]}"


def test_ready_is_0(tmp_path: Path, listener: str, capsys: pytest.CaptureFixture[str]) -> None:
    with supervised(tmp_path, {"state": "ready", "endpoint": listener}) as root:
        assert ctl.run([*root, "health", "demo"]) == 0
    assert capsys.readouterr().out == "The vLLM API is ready\n"


def test_ready_where_nobody_listens_any_more_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with supervised(tmp_path, {"state": "ready", "endpoint": f"http://127.0.0.1:{free_port()}"}) as root:
        assert ctl.run([*root, "health", "demo"]) == 1
    assert "nobody listens" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["ready", "starting", "resolving", "unconfigured"])
def test_the_last_word_of_a_supervisor_that_was_killed_is_1(tmp_path: Path, listener: str, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    with supervised(tmp_path, {"state": state, "endpoint": listener}, listens=False) as root:
        assert ctl.run([*root, "health", "demo"]) == 1
    assert "supervisor of demo is gone" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["created", "checking", "resolving", "launching", "starting", "proven"])
def test_loading_is_2_and_says_how_long_it_may_take(tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"state": state, "phase": "fetch", "progress": {"fraction": 0.4, "text": "3 of 7 GB"}}
    with supervised(tmp_path, said) as root:
        assert ctl.run([*root, "health", "demo"]) == 2
    out = capsys.readouterr().out
    assert out.startswith("The vLLM API is starting. A first-time model download plus load can take 30+ minutes")
    assert out.endswith("  now: fetch 40% 3 of 7 GB\n")


def test_no_model_is_3_and_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with supervised(tmp_path, {"state": "unconfigured"}) as root:
        assert ctl.run([*root, "health", "demo"]) == 3
    out = capsys.readouterr().out
    assert out.startswith("No model selected. Run: vllmctl")
    assert "model set demo" in out


@pytest.mark.parametrize(
    ("said", "last", "words"),
    [
        (None, None, "demo is not running"),
        (None, ERROR, "port 8000 is held by nginx.service"),
        ({"state": "stopped", "error": ERROR}, ERROR, "systemctl stop nginx"),
        ({"state": "killing", "error": ERROR}, None, "port 8000 is held"),
        ({"state": "stopped", "error": TIMEOUT}, TIMEOUT, "The vLLM API did not come up within 35 minutes. Check the service logs for errors."),
        ({"state": "draining"}, None, "is stopping"),
        ({"state": 5}, None, "demo is not running"),
    ],
)
def test_what_does_not_run_is_1_with_the_reason(tmp_path: Path, said: Any, last: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with supervised(tmp_path, said, last) as root:
        assert ctl.run([*root, "health", "demo"]) == 1
    assert words in capsys.readouterr().out


def test_an_instance_that_is_not_there_is_no_health(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        ctl.run(["--root", str(tmp_path), "health", "nobody"])


def test_health_prints_nothing_that_a_terminal_obeys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with supervised(tmp_path, {"state": "starting", "phase": "\x1b[2J", "progress": {"text": "\x9b31m"}}) as root:
        assert ctl.run([*root, "health", "demo"]) == 2
    assert capsys.readouterr().out.replace("\n", "").isprintable()


@pytest.mark.parametrize("endpoint", ["", "http://name.invalid:80", "http://127.0.0.1:x", "http://127.0.0.1:99999", "unix:relative", "x", "http://[::1:80", "http://127.0.0.1:²", "unix:/a\0b"])
def test_an_endpoint_that_says_nothing_is_not_judged(endpoint: str) -> None:
    assert alive.serves(endpoint) is None


def test_health_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    """A load balancer asks each second; how fast it is, is a benchmark's to say."""
    import subprocess

    script = "import sys\nfrom vllmd.ctl import run\nrun(sys.argv[1:])\nprint(*sys.modules)"
    with supervised(tmp_path, {"state": "starting"}) as root:
        done = subprocess.run([sys.executable, "-c", script, *root, "health", "demo"], capture_output=True, text=True, check=True, timeout=60)
    assert not set(done.stdout.splitlines()[-1].split()) & {"asyncio", "subprocess", "yaml", "rich", "curses", "http.client", "h11", "vllmd.config.settings"}


# -- load


def reading(at: float, **ranks: Rank) -> Sample:
    return Sample(at, at, "ok", ranks)


def test_rates_are_of_the_time_between_two_readings() -> None:
    before = reading(10, a=Rank(1, generated=100, prompted=1000), b=Rank(1, generated=0, prompted=0))
    now = reading(12, a=Rank(9, 3, 1, generated=150, prompted=1000, kv_used=0.2), b=Rank(9, 1, 0, generated=30, prompted=10, kv_used=0.71234))
    assert load_of(before, now) == Load(4, 1, 40.0, 5.0, 0.712)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (None, reading(12, a=Rank(1, generated=5))),
        (reading(12, a=Rank(1, generated=5)), reading(12, a=Rank(1, generated=6))),
        (reading(10, a=Rank(1, generated=50)), reading(12, a=Rank(1, generated=5))),
        (reading(10, a=Rank(1)), reading(12, a=Rank(1))),
        (reading(10, b=Rank(1, generated=1)), reading(12, a=Rank(1, generated=5))),
    ],
    ids=["first", "no time", "began anew", "not said", "another rank"],
)
def test_a_rate_that_cannot_be_known_is_none(before: Sample | None, now: Sample) -> None:
    assert load_of(before, now).tokens_per_s is None


# -- events

ENTRY = {
    "__REALTIME_TIMESTAMP": "1795276800123456",
    "MESSAGE": "the engine hangs",
    "PRIORITY": "3",
    "SYSLOG_IDENTIFIER": "vllmd",
    "VLLMD_INSTANCE": "demo",
    "VLLMD_EVENT": "engine-hung",
    "VLLMD_HINT": "look",
    "_PID": "77",
}


def test_an_event_as_an_object() -> None:
    assert events.as_dict(ENTRY) == {
        "schema": 1,
        "at": "2026-11-21T16:00:00.123Z",
        "instance": "demo",
        "event": "engine-hung",
        "priority": 3,
        "level": "error",
        "text": "the engine hangs",
        "fields": {"hint": "look"},
    }


def test_an_event_as_a_line() -> None:
    line = events.shown(ENTRY, colour=False)
    assert line.endswith("error   demo engine-hung: the engine hangs (hint: look)")
    assert "\x1b[31m" in events.shown(ENTRY, colour=True)


@pytest.mark.parametrize("message", ["\x1b[2J\nx", [27, 91, 50, 74], [1, "x"], None, 5, ["a", "b"], [300]])
@pytest.mark.parametrize("more", [{}, {"PRIORITY": "x"}, {"PRIORITY": ""}, {"__REALTIME_TIMESTAMP": "9" * 400}, {"__REALTIME_TIMESTAMP": "253402300799000000"}, {"__REALTIME_TIMESTAMP": "-62135596800000000"}, {"VLLMD_EVENT": ["\x1b", "b"]}, {"VLLMD_INSTANCE": None}])
@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_hostile_entries_are_harmless(message: Any, more: dict[str, Any], zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        entry = {**ENTRY, "MESSAGE": message, **more}
        assert events.shown(entry, colour=False).isprintable()
        json.dumps(events.as_dict(entry), allow_nan=False)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(("text", "found"), [("[" * 60_000, {}), ('{"paused": {"until": NaN}}', {"paused": {"until": None}}), ("[]", {}), ("\x1b", {})])
def test_what_a_control_socket_answers_is_an_object_or_nothing(text: str, found: dict[str, Any]) -> None:
    assert control.decoded(text) == found


def test_lines_that_are_no_entries_are_passed_over() -> None:
    stream = io.BytesIO(b"garbage\n[1]\n" + json.dumps(ENTRY).encode() + b"\n\xff\n" + b"[" * 100000 + b"\n{}")
    assert list(events.entries(stream)) == [ENTRY, {}]


def test_the_journal_is_asked_for_the_supervisors_of_all_instances() -> None:
    argv = events.command("*", scope="system", follow=False, lines=None, since=None)
    assert argv[:2] == ["journalctl", "--unit=vllmd@*.service"]
    assert {"--unit=vllmd-gpu.service", "--identifier=vllmd", "--lines=50", "--output=json"} <= set(argv)
    assert "--unit=vllmd-gpu.service" not in events.command("demo", scope="system", follow=False, lines=None, since=None)
    assert "--lines=all" in events.command("demo", scope="user", follow=True, lines=None, since="today")


JOURNALCTL = """#!/bin/sh
echo "$@" > "$0.args"
printf '%s\\n' '{entry}'
"""


def test_events_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "journalctl"
    program.write_text(JOURNALCTL.replace("{entry}", json.dumps(ENTRY)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("vllmd.ctl.unit.runs", lambda _scope: True)
    assert ctl.run(["events", "demo", "--json", "-n", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["event"] == "engine-hung"
    assert "--unit=vllmd@demo.service --identifier=vllmd --lines=5" in (tmp_path / "journalctl.args").read_text()
    with pytest.raises(UsageError):
        ctl.run(["events", "demo", "-n", "many"])
