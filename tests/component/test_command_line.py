"""The five commands as a shell, cron or a pipe runs them: whatever their streams and environment are, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllmd.engines import record

pytestmark = pytest.mark.component

BIN = Path(sys.executable).parent
COMMANDS = ("vllmd", "vllmctl", "vllm-preflight", "vllm-resolve-model", "vllm-serve")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An instance t, and an engine that only prints where its streams are."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/t.yaml").write_text("model: Qwen/Ä\nserve: {served_model_name: 'é😀'}\n", encoding="utf-8")
    program = tmp_path / "engines/vllm-1/bin/vllm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    record.write(tmp_path / "engines/vllm-1", record.Record("1", "cpu", ("--port",)))
    (tmp_path / "engines/current").symlink_to("vllm-1")
    return tmp_path


def shell(line: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """stderr comes with stdout where the line does not say otherwise."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{{ {line}\n}} 2>&1"],
        capture_output=True, text=True, errors="replace", timeout=60, check=False, env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environ},
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_command_that_is_asked_for_itself_answers_whatever_its_streams_are(command: str, option: str) -> None:
    assert command in shell(f"{command} {option}").stdout
    for redirection in (">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-", "| true"):
        done = shell(f"{command} {option} {redirection}")
        assert (done.returncode, "Traceback" in done.stdout) == (0, False), (redirection, done.stdout)


@pytest.mark.parametrize("verb", ["check t", "check t --json", "check t --show-origin"])
def test_a_check_whose_output_goes_nowhere_is_still_a_check(root: Path, verb: str) -> None:
    for redirection in (">&-", "2>&-", ">&- 2>&-", "<&-", "| true"):
        done = shell(f"vllmd --root {root} {verb} {redirection}")
        assert (done.returncode, "Traceback" in done.stdout) == (0, False), (redirection, done.stdout)
    assert shell(f"vllmd --root {root} check other >&- | true").returncode == 78


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "soon"])
def test_a_timeout_that_is_none_is_refused(seconds: str) -> None:
    done = shell(f"vllmctl start t --timeout={seconds}")
    assert (done.returncode, "is no number of seconds" in done.stdout) == (64, True), done.stdout


def test_an_output_that_cannot_be_written_is_said_in_two_lines(root: Path) -> None:
    done = shell(f"vllmd --root {root} check t >/dev/full")
    assert done.returncode == 74
    assert done.stdout.splitlines()[0] == "vllmd: cannot write: No space left on device"
    assert "Traceback" not in done.stdout
    assert shell("vllm-serve --help >/dev/full").returncode == 1


def test_an_output_whose_encoding_is_narrow_is_no_traceback(root: Path) -> None:
    narrow = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for environ in (narrow, {"PYTHONIOENCODING": "ascii"}):
        done = shell(f"vllmd --root {root} check t", **environ)
        assert (done.returncode, r"\xe9" in done.stdout) == (0, True), done.stdout


def test_a_file_that_is_opened_does_not_become_the_closed_output(root: Path) -> None:
    """With fd 1 closed, the next file that is opened is fd 1, and print() goes into it."""
    probe = "import os; from vllmd.commandline import _make_usable as m; m(); print(os.readlink('/proc/self/fd/1'), file=open(2, 'w', closefd=False))"
    assert shell(f'{sys.executable} -c "{probe}" >&-').stdout == "/dev/null\n"


def test_a_bug_of_ours_keeps_its_traceback_and_ends_with_70(capsys: pytest.CaptureFixture[str]) -> None:
    from vllmd.commandline import guarded

    def broken(_argv: object) -> int:
        raise RuntimeError("a bug")

    assert guarded("vllmd", broken, []) == 70
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_what_is_printed_of_strange_arguments_is_two_lines(root: Path) -> None:
    for argument in (b"--set=\x1b[2J\nx=1", b"--set=a\xff=1", b"--set=serve.api_key:s3cr3t"):
        argv = [os.fsencode(BIN / "vllmd"), b"--root", os.fsencode(root), b"check", b"t", argument]
        done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
        assert done.returncode == 64
        assert b"\x1b" not in done.stderr
        assert b"s3cr3t" not in done.stderr


def test_an_environment_with_control_characters_stays_on_its_line(root: Path) -> None:
    done = shell(f"vllmd --root {root} check t", VLLM_SOMETHING="a\n\x1b[2Jb")
    assert r"VLLM_SOMETHING=a\n\x1b[2Jb" in done.stdout
    document = json.loads(shell(f"vllmd --root {root} check t --json").stdout)
    assert document["plan"]["served_name"] == "é😀"
