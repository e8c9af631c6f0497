"""vllmctl: its command line, what it says about instances, and the reasons that it gives for failures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllmd import commandline, ctl
from vllmd.config.paths import SYSTEM, Paths, root_paths
from vllmd.ctl import files as ctl_files
from vllmd.ctl import follow as ctl_follow
from vllmd.ctl import logs as ctl_logs
from vllmd.ctl import progress as ctl_progress
from vllmd.ctl import status as ctl_status
from vllmd.ctl import unit as ctl_unit
from vllmd.errors import Status, UsageError, VllmdError
from vllmd.system.journal import Journal

pytestmark = pytest.mark.unit

READY = {
    "schema": 1,
    "instance": "demo",
    "state": "ready",
    "since": "2026-01-02T03:04:05.000Z",
    "phase": "ready",
    "progress": {"fraction": None, "text": ""},
    "engine": {"name": "vllm", "version": "0.32.0+cpu", "executable": "/opt/x", "pid": 77},
    "model": {"id": "org/tiny", "directory": "/models/tiny", "via": "local"},
    "endpoint": "http://127.0.0.1:8000",
    "endpoints": ["http://127.0.0.1:8000"],
    "error": None,
    "warnings": [],
}
ERROR = {"code": "port_in_use", "what": "port 8000 is held by nginx.service", "hint": "systemctl stop nginx", "status": 2}
SHOWN = """LoadState=loaded
ActiveState=active
SubState=running
Result=success
ExecMainCode=0
ExecMainStatus=0
MainPID=77
NRestarts=2
StateChangeTimestamp=Sat 2026-11-21 01:51:19 UTC
MemoryCurrent=[not set]
UnitFileState=enabled
Job=
StatusText=Serving a=b at http://127.0.0.1:8000
"""


def written(root: Path, name: str = "demo", status: Any = None, last: Any = None) -> Path:
    paths = root_paths(root)
    for directory, file, content in ((paths.instance_runtime(name), "status.json", status), (paths.instance_state(name), "last.json", last)):
        if content is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / file).write_text(content if isinstance(content, str) else json.dumps(content))
    paths.config.mkdir(parents=True, exist_ok=True)
    paths.instance_config(name).write_text("model: x\n")
    return root


# -- the command line


@pytest.mark.parametrize("argv", [["--root", "/x", "status"], ["status", "--root", "/x"], ["status", "--root=/x"], ["--root=/x", "status"]])
def test_root_may_stand_before_or_after_the_verb(argv: list[str]) -> None:
    paths, rest = commandline.take_globals(argv)
    assert (paths, rest) == (root_paths(Path("/x")), ["status"])


def test_without_globals_the_paths_are_the_system_s() -> None:
    assert commandline.take_globals(["status", "demo"]) == (SYSTEM, ["status", "demo"])


@pytest.mark.parametrize("argv", [["--root"], ["--root", "--user"], ["--user", "--root", "/x", "status"]])
def test_globals_that_make_no_sense_are_usage_errors(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        commandline.take_globals(argv)


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["start"], ["status", "--nonsense"], ["logs", "x", "--engine", "--events"], ["status", "../x"], ["stop", "vllmd"]])
def test_wrong_command_line_is_two_lines_and_64(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vllmctl", *argv])
    assert ctl.main() == Status.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("vllmctl: ")
    assert lines[1].startswith("  hint: ")
    assert len(lines) == 2


@pytest.mark.parametrize("text", ["demo", "vllmd@demo", "vllmd@demo.service"])
def test_an_instance_may_be_given_as_its_unit(text: str) -> None:
    assert ctl_unit.instance_name(text) == "demo"


def test_engine_verb_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllmd.ctl import engine as command

    seen: list[Any] = []

    def main(argv: list[str], paths: Paths) -> int:
        seen.append((argv, paths))
        return 0

    monkeypatch.setattr(command, "main", main)
    assert ctl.run(["engine", "install", "--version", "1.0", "--root", "/x", "--cpu"]) == 0
    assert seen == [(["install", "--version", "1.0", "--cpu"], root_paths(Path("/x")))]


def test_help_imports_nothing_that_takes_long() -> None:
    """`--help` is to answer at once; how fast is a benchmark's to say, since test machines are shared."""
    script = "import sys\nfrom vllmd.ctl import main\ntry:\n    main()\nfinally:\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "usage: vllmctl" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"asyncio", "yaml", "psutil", "prometheus_client", "rich", "aiohttp", "h11", "botocore", "huggingface_hub", "vllmd.config.settings"}


# -- status


def test_status_of_an_instance_without_systemd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.run(["--root", str(written(tmp_path, status=READY)), "status", "demo"]) == 0
    shown = capsys.readouterr().out
    for part in ("demo  ready", "org/tiny (/models/tiny, via local)", "http://127.0.0.1:8000", "vllm 0.32.0+cpu pid 77"):
        assert part in shown


def test_status_says_what_ended_an_instance_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = written(tmp_path, last={"schema": 1, "instance": "demo", "at": "2026-01-02T03:04:05Z", "status": 2, "error": ERROR})
    assert ctl.run(["status", "demo", "--root", str(root)]) == ctl_status.NOT_SERVING
    shown = capsys.readouterr().out
    assert "error      port 8000 is held by nginx.service" in shown
    assert "hint       systemctl stop nginx" in shown


def test_status_of_a_running_instance_shows_its_last_error_without_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = written(tmp_path, status=READY, last={"at": "2026-01-02T03:04:05Z", "error": ERROR})
    assert ctl.run(["status", "demo", "--root", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "last error port 8000" in shown
    assert "hint " not in shown


def test_status_json_is_one_object_for_one_and_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = written(written(tmp_path, status=READY), "other")
    assert ctl.run(["status", "--json", "--root", str(root)]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert [(each["instance"], each["state"]) for each in everything["instances"]] == [("demo", "ready"), ("other", "stopped")]
    assert everything["schema"] == 1
    ctl.run(["status", "demo", "--json", "--root", str(root)])
    assert json.loads(capsys.readouterr().out)["instances"][0]["status"] == READY


def test_status_of_an_unknown_instance_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no instance nope"):
        ctl.run(["status", "nope", "--root", str(tmp_path)])


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null", "[" * 100000, '{"state": 7, "engine": [], "model": "x", "endpoints": [1], "warnings": {}, "error": "y", "progress": 3}'])
def test_status_bears_any_status_file(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = written(tmp_path, status=content, last=content)
    assert ctl.run(["status", "demo", "--root", str(root)]) == ctl_status.NOT_SERVING
    assert "demo  stopped" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_json_is_json_whatever_a_supervisor_wrote(number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python's json reads and writes NaN; jq, Go and JavaScript refuse the whole answer for it."""
    written(tmp_path, status={})
    (root_paths(tmp_path).instance_runtime("demo") / "status.json").write_text(f'{{"state": "ready", "load": {{"running": {number}}}}}')
    assert ctl.run(["--root", str(tmp_path), "status", "--json"]) == 0
    assert '"load": {"running": null}' in capsys.readouterr().out


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize("moment", [253402300799, "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+00:00", -62135596800])
def test_status_bears_the_ends_of_the_calendar(zone: str, moment: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        written(tmp_path, status={"state": "ready", "since": moment, "last_event": {"at": moment, "event": "x"}})
        for words in (["status", "demo"], ["top", "--once"], ["top", "--json"]):
            assert ctl.run(["--root", str(tmp_path), *words]) == 0
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("active", "sub", "state"),
    [("inactive", "dead", "stopped"), ("failed", "failed", "failed"), ("activating", "auto-restart", "restarting"), ("active", "running", "ready")],
)
def test_a_status_file_that_outlived_its_supervisor_is_not_believed(active: str, sub: str, state: str) -> None:
    assert ctl_status.true_state(READY, ctl_unit.UnitState(active=active, sub=sub)) == state


def test_start_without_systemd_says_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VllmdError) as raised:
        ctl.run(["start", "demo", "--root", "/x"])
    assert raised.value.hint.startswith("vllmd --root /x run ")


# -- systemctl's answers


def test_show_is_parsed() -> None:
    unit = ctl_unit.parse_show(SHOWN)
    assert (unit.active, unit.main_pid, unit.restarts, unit.memory_bytes, unit.has_job) == ("active", 77, 2, None, False)
    assert unit.text == "Serving a=b at http://127.0.0.1:8000"
    assert ctl_unit.parse_show("Job=12\nMemoryCurrent=2048\n") == ctl_unit.UnitState(has_job=True, memory_bytes=2048)
    assert ctl_unit.parse_show("MemoryCurrent=18446744073709551615").memory_bytes is None


def test_reason_of_a_failure_is_what_the_supervisor_wrote() -> None:
    unit = ctl_unit.UnitState(active="failed", sub="failed", result="exit-code", exited=True, exit_status=2)
    error = ctl_follow.failure("demo", unit, ctl_files.problem({"error": ERROR}), "vllmctl")
    assert (error.code, error.status, error.hint) == ("port_in_use", Status.PORT_FOREIGN, "systemctl stop nginx")
    assert error.what == "demo did not start: port 8000 is held by nginx.service"


def test_failure_that_systemd_retries_says_so() -> None:
    unit = ctl_unit.UnitState(active="activating", sub="auto-restart", result="exit-code", exited=True, exit_status=75)
    error = ctl_follow.failure("demo", unit, None, "vllmctl --user")
    assert error.status is Status.TEMPFAIL
    assert "systemd tries again" in error.hint
    assert "vllmctl --user stop demo" in error.hint


@pytest.mark.parametrize(
    ("result", "number", "says", "status"),
    [
        ("exit-code", 203, "cannot be executed", Status.CONFIG),
        ("exit-code", 226, "file system", Status.CONFIG),
        ("exit-code", 78, "status 78", Status.CONFIG),
        ("watchdog", 0, "hung", Status.TEMPFAIL),
        ("oom-kill", 0, "out of memory", Status.SOFTWARE),
        ("start-limit-hit", 70, "too often", Status.TEMPFAIL),
        ("weird", 0, "weird", Status.SOFTWARE),
    ],
)
def test_reason_of_a_failure_without_a_record_is_systemd_s(result: str, number: int, says: str, status: Status) -> None:
    unit = ctl_unit.UnitState(active="failed", sub="failed", result=result, exited=number != 0, exit_status=number)
    error = ctl_follow.failure("demo", unit, None, "vllmctl")
    assert says in error.what
    assert error.status is status
    assert error.hint


# -- logs


def journalctl(**given: Any) -> list[str]:
    wanted: dict[str, Any] = {"scope": "system", "follow": False, "lines": None, "since": None, "only": None, "output": None}
    return ctl_logs.journalctl("demo", **(wanted | given))


def test_logs_are_those_of_the_unit() -> None:
    assert journalctl() == ["journalctl", "--unit=vllmd@demo.service"]
    assert journalctl(scope="user") == ["journalctl", "--user-unit=vllmd@demo.service"]
    assert journalctl(follow=True)[2:] == ["--follow", "--lines=50"]
    assert journalctl(lines="7", since="today", output="cat")[2:] == ["--lines=7", "--since=today", "--output=cat"]


@pytest.mark.parametrize("only", ["engine", "events"])
def test_logs_select_by_what_the_journal_adapter_writes(only: str, tmp_path: Path) -> None:
    journal = Journal({"instance": "demo"}, path=tmp_path / "none")
    if only == "engine":
        journal.engine_line("hello")
    else:
        journal.event("starting", "hello")
    entry = journal._outbox.head()
    journal.close(0)
    (identifier,) = [word.removeprefix("--identifier=") for word in journalctl(only=only) if word.startswith("--identifier")]
    assert f"SYSLOG_IDENTIFIER={identifier}\n".encode() in entry


ESCAPE = "\x1b]0;title\x07"


def hostile(value: Any) -> Any:
    """The same document, with a control sequence in each of its texts."""
    if isinstance(value, dict):
        return {name: item if name in ("state", "instance") else hostile(item) for name, item in value.items()}
    return [hostile(item) for item in value] if isinstance(value, list) else f"{ESCAPE}{value}" if isinstance(value, str) else value


@pytest.mark.parametrize("words", [["status"], ["status", "demo"]])
def test_status_sends_nothing_of_the_service_s_to_the_terminal_as_it_is(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine that was broken into writes as the service's account, and root looks at it."""
    said = hostile({**READY, "warnings": ["w"], "error": ERROR, "paused": {"until": "u", "by": "b", "why": "y"}})
    ctl.run(["--root", str(written(tmp_path, status=said, last={**said, "status": 2})), *words])
    shown = capsys.readouterr().out
    assert (ESCAPE[0] in shown, "\\x1b]0;title" in shown) == (False, True)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_and_endpoint_reach_the_terminal_as_text(is_terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with ctl_progress.progress("demo") as show:
        show(ctl_progress.Shown(f"loading{ESCAPE}", 0.5, f"half{ESCAPE}\n"))
    ctl_follow._say(f"ready at {ESCAPE}")
    shown = capsys.readouterr()
    assert ESCAPE not in shown.out + shown.err
    assert "\\x1b]0;title" in shown.out
    assert is_terminal or "\\x1b]0;title" in shown.err
