"""`vllmctl top` in a real terminal, over real daemons with the fake engine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.component.daemons import quick
from tests.component.gpu_hosts import GpuHost
from tests.harness import MARK, Instance
from tests.terminals import Terminal
from tools import picture

pytestmark = pytest.mark.component

CTL = "import sys; from vllmd.ctl import main; sys.exit(main())"


def top(root: Path, *arguments: str, columns: int = 80, lines: int = 24, **env: str) -> Terminal:
    argv = [sys.executable, "-c", CTL, "--root", str(root), "top", "--interval", "0.2", *arguments]
    environ = {"PATH": os.environ["PATH"], "HOME": str(root), "LANG": "C.UTF-8", "TERM": "xterm-256color", MARK: str(root), **env}
    return Terminal(argv, env=environ, columns=columns, lines=lines)


@contextlib.contextmanager
def asked(instance: Instance, tokens: int = 2000) -> Iterator[None]:
    """A request in flight."""
    with contextlib.closing(instance.connection(60)) as link:
        link.request("POST", "/v1/completions", json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": tokens}), {"content-type": "application/json"})
        yield


def row(lines: list[str], name: str) -> str:
    return next((line for line in lines if line[2:].startswith(f"{name} ")), "")


def test_it_shows_instances_as_they_live_and_die() -> None:
    with quick({"FAKE_TOKEN_S": "0.05"}, {"watch": {"heartbeat_interval_s": 0.2}}) as instance, top(instance.root) as screen:
        instance.wait_ready()
        screen.wait("ready", lambda lines: " ready " in row(lines, "demo"))
        assert screen.display[0].startswith("vllmctl top")
        with asked(instance):
            working = screen.wait("tokens", lambda lines: row(lines, "demo").split()[3:4] == ["1"] and float(row(lines, "demo").split()[5].rstrip("k")) > 0)
        assert all(len(line) <= 80 for line in working)
        instance.kill_engine("vllm")
        instance.wait_exit()
        screen.wait("the reason", lambda lines: "engine" in row(lines, "demo").partition(" failed ")[2])
        screen.type("q")
        assert screen.wait_exit() == 0
        assert screen.is_sane


def test_a_supervisor_that_was_killed_is_no_longer_ready() -> None:
    with quick() as instance, top(instance.root) as screen:
        instance.wait_ready()
        screen.wait("ready", lambda lines: " ready " in row(lines, "demo"))
        instance.signal(signal.SIGKILL)
        screen.wait("failed", lambda lines: " failed " in row(lines, "demo"))
        screen.type("q")
        assert screen.wait_exit() == 0


@pytest.mark.parametrize(("name", "is_ascii"), [("xx_YY.UTF-8", False), ("xx_YY", True)])
def test_a_locale_that_this_host_does_not_have_is_borne(tmp_path: Path, name: str, is_ascii: bool) -> None:
    """ssh sends the client's LC_*: it was a traceback."""
    with top(tmp_path, LC_ALL=name) as screen:
        shown = screen.wait_text("no instances")
        assert "\n".join(shown).isascii() or not is_ascii
        screen.type("q")
        assert screen.wait_exit() == 0
        assert screen.is_sane


@pytest.mark.parametrize(("end", "status"), [("q", 0), ("\x03", 130)])
def test_it_leaves_the_terminal_as_it_was(tmp_path: Path, end: str, status: int) -> None:
    with top(tmp_path) as screen:
        screen.wait_text("no instances")
        screen.type(end)
        assert screen.wait_exit() == status
        assert screen.is_sane
        assert b"Traceback" not in screen.raw


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(tmp_path: Path, number: int) -> None:
    with top(tmp_path) as screen:
        screen.wait_text("no instances")
        screen.process.send_signal(number)
        assert screen.wait_exit() == 0
        assert screen.is_sane


def test_it_stops_and_goes_on_as_other_programs_do(tmp_path: Path) -> None:
    """Ctrl-Z in a shell: only there is a program stopped by it."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8", "TERM": "xterm-256color", "PS1": "prompt: "}
    with Terminal(["bash", "--norc", "--noprofile", "-i"], env=env) as screen:
        screen.wait_text("prompt:")
        screen.type(f"{sys.executable} -c '{CTL}' --root {tmp_path} top\n")
        screen.wait_text("no instances")
        screen.type("\x1a")
        screen.wait_text("Stopped")
        screen.type("echo still ${TERM%%-*} here\n")
        screen.wait_text("still xterm here")
        screen.type("fg\n")
        screen.wait("the screen again", lambda lines: lines[0].startswith("vllmctl top"))
        screen.type("q")
        screen.wait("the shell again", lambda lines: lines[23].startswith("prompt:"))  # pyte has no second screen to leave
        screen.type("exit\n")
        assert screen.wait_exit() == 0


def test_it_follows_the_size_of_the_terminal(tmp_path: Path) -> None:
    with top(tmp_path) as screen:
        screen.wait_text("no instances")
        screen.resize(120, 40)
        screen.wait("the keys in line 40", lambda lines: "q quit" in lines[39])
        screen.resize(20, 3)
        screen.wait_text("too small: 20x3")
        screen.resize(60, 12)
        screen.wait("the keys in line 12", lambda lines: "q quit" in lines[11])
        screen.type("?")
        screen.wait_text("Keys")
        screen.type("?q")
        assert screen.wait_exit() == 0


def test_no_colour_means_none(tmp_path: Path) -> None:
    with top(tmp_path, NO_COLOR="1") as screen:
        screen.wait_text("no instances")
        assert {cell.fg for line in screen.screen.buffer.values() for cell in line.values()} <= {"default"}
        screen.type("q")
        assert screen.wait_exit() == 0


def test_a_dumb_terminal_and_a_pipe_are_told_what_to_do(tmp_path: Path) -> None:
    with top(tmp_path, TERM="dumb") as screen:
        assert screen.wait_exit() == 64
        assert "--once" in screen.text
    argv = [sys.executable, "-c", CTL, "--root", str(tmp_path), "top"]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (64, "")
    assert "--once" in done.stderr


def test_the_driver_s_word_is_on_the_screen_and_in_the_picture(tmp_path: Path) -> None:
    """The picture of the documentation comes from here: VLLMD_PICTURES names the folder."""
    with GpuHost(2) as host, contextlib.ExitStack() as stack:
        qwen = stack.enter_context(host.instance("qwen3", {"gpus": ["0"], "watch": {"heartbeat_interval_s": 0.2}}, fake={"FAKE_TOKEN_S": "0.05"}))
        broken = stack.enter_context(quick(name="mistral", root=host.root, fake={"FAKE_EXIT": "1@0.1", "FAKE_ERROR": "torch.OutOfMemoryError: CUDA out of memory"}))
        loading = stack.enter_context(quick(name="llama", root=host.root, fake={"FAKE_START_S": "30", "FAKE_SPEED": "1"}))
        qwen.wait_ready()
        host.memory(0, 61000, (qwen.engine_process("VLLM::Worker").pid, 60500))
        broken.wait_exit()
        screen = stack.enter_context(top(host.root, columns=100, lines=21, **host.stub.environ()))
        with asked(qwen), asked(qwen), asked(qwen):
            screen.wait("GPUs", lambda lines: any("59.6/78G" in line and "qwen3" in line for line in lines))
            screen.wait("a bar", lambda lines: re.search("█.* [1-9][0-9]%", row(lines, "llama")))
            screen.wait("tokens", lambda lines: row(lines, "qwen3").split()[4:5] == ["3"])
            screen.type("\x1bOB\x1bOB")
            screen.wait_text("── qwen3")
        drawn = picture.svg(screen.screen).replace(str(host.root), "/var/lib/models")
        folder = Path(os.environ.get("VLLMD_PICTURES") or tmp_path)
        (folder / "top.svg").write_text(drawn)
        assert "qwen3" in drawn
        screen.type("q")
        assert screen.wait_exit() == 0
        host.memory(0)
        for instance in (loading, qwen):
            instance.signal(signal.SIGTERM)
            assert instance.wait_exit() == 0
