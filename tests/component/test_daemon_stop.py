"""A stop, in every stage: it ends in bounded time, with status 0, nothing left, and requests in flight completed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pty
import signal
import sys
import time
from collections.abc import Callable, Mapping

import pytest

from tests import procs
from tests.component.daemons import Tampered, assert_nothing_left, extends, first, hold, quick, stop
from tests.harness import Instance

pytestmark = pytest.mark.component

SLOW_LAUNCHER = """
import sys, pathlib
program = pathlib.Path({path!r})
program.write_text('#!/bin/sh\\ncase "$*" in *launcher.py*) sleep 60;; esac\\nexec ' + sys.executable + ' "$@"\\n')
program.chmod(0o755)
sys.executable = str(program)
"""


def checking() -> Instance:
    """The driver's tool hangs, as it does with a GPU that is lost."""
    instance = quick(config={"gpus": "all"})
    tool = instance.root / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nsleep 60\n")
    tool.chmod(0o755)
    instance.env["PATH"] = f"{tool.parent}:{os.environ['PATH']}"
    return instance


def resolving() -> Instance:
    hold(instance := quick(), "resolve")
    return instance


def launching() -> Instance:
    instance = Tampered.quick()
    instance.patch = SLOW_LAUNCHER.format(path=str(instance.root / "python"))
    return instance


def starting() -> Instance:
    return quick({"FAKE_START_S": "60"})


def wedged() -> Instance:
    return quick({"FAKE_START_S": "60", "FAKE_SIGTERM_STARTING": "wedge"})


def proving() -> Instance:
    return quick({"FAKE_COMPLETIONS": "hang"})


def verifying() -> Instance:
    hold(instance := quick(config={"model": {"verify": "sha256"}}), "verify")
    return instance


STAGES: Mapping[str, tuple[Callable[[], Instance], str, str]] = {
    "checking": (checking, "checking", ""),
    "resolving": (resolving, "resolving", ""),
    "launching": (launching, "launching", "spawn"),
    "starting, SIGTERM lost": (starting, "starting", "loading-weights"),
    "starting, SIGTERM wedges": (wedged, "starting", "loading-weights"),
    "proof of life": (proving, "starting", "proof"),
    "verifying": (verifying, "proven", ""),
    "ready": (quick, "ready", ""),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_in_any_stage_ends_with_0_and_leaves_nothing(stage: str) -> None:
    make, state, phase = STAGES[stage]
    with make() as instance:
        instance.wait_state(state)
        procs.wait_until(f"phase {phase}", lambda: not phase or instance.status_json()["phase"] == phase, 30)
        if stage == "checking":
            wait_for_process(str(instance.root / "bin/nvidia-smi"))
        if stage == "launching":
            wait_for_process(f"{instance.root}/python")
        asked = time.monotonic()
        stop(instance)
        assert time.monotonic() - asked < 8
        assert first(instance, "STOPPING").at - asked < 3
        assert ("1" in instance.notify.told("READY")) is (stage == "ready")
        assert instance.last_json()["error"] is None
        assert instance.status_json()["state"] == "stopped"
        assert not [process for process in procs.processes() if str(instance.root) in process.cmdline]


def wait_for_process(word: str) -> None:
    procs.wait_until(word, lambda: any(word in process.cmdline for process in procs.processes()), 30)


def test_the_stop_of_a_real_cgroup_leaves_no_group() -> None:
    with quick({"FAKE_STRAY": "setsid,fork,rename,ignore,env"}, cgroup=True) as instance:
        instance.wait_ready()
        stop(instance)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT], ids=["Ctrl-C", "Ctrl-backslash"])
def test_the_keys_of_a_terminal_stop_as_sigterm_does(number: signal.Signals) -> None:
    with quick() as instance:
        instance.wait_ready()
        instance.signal(number)
        assert instance.wait_exit() == 0
        assert_nothing_left(instance)


def test_signals_that_mean_nothing_end_nothing() -> None:
    with quick() as instance:
        instance.wait_ready()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGWINCH, signal.SIGCHLD):
            instance.signal(number)
        stop(instance)


ON_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(os.open(sys.argv[1], os.O_RDWR), termios.TIOCSCTTY, 0)
if sys.argv[2] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[3], sys.argv[3:])
"""


@pytest.mark.parametrize("how", ["plain", "nohup"])
def test_a_terminal_that_hangs_up_stops_the_instance_unless_nohup_says_otherwise(how: str) -> None:
    """An ssh connection that breaks: nobody is left who could stop it."""
    main, terminal = pty.openpty()
    with Tampered.quick(before=(sys.executable, "-c", ON_TERMINAL, os.ttyname(terminal), how)) as instance:
        os.close(terminal)
        instance.wait_ready()
        instance.signal(signal.SIGHUP)
        procs.wait_until("a reload as long as it is there", lambda: "configuration read again" in instance.log())
        os.close(main)
        if how == "nohup":
            procs.wait_until("another reload", lambda: instance.log().count("configuration read again") > 1)
            stop(instance)
        assert instance.wait_exit() == 0
        assert_nothing_left(instance)


def open_stream(instance: Instance, tokens: int) -> http.client.HTTPResponse:
    """A streamed completion whose first token has come. Its connection is closed when the response is."""
    connection = instance.connection()
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": tokens, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    assert answer.readline().startswith(b"data: ")
    return answer


def test_a_stop_lets_a_stream_complete_also_when_it_is_asked_for_twice() -> None:
    with quick({"FAKE_TOKEN_S": "0.02"}) as instance:
        instance.wait_ready()
        with contextlib.closing(open_stream(instance, 100)) as stream:
            instance.signal(signal.SIGTERM)
            instance.wait_state("draining")
            instance.signal(signal.SIGTERM)
            instance.signal(signal.SIGINT)
            text = stream.read().decode()
        assert text.count("fake") >= 98
        assert text.rstrip().endswith("data: [DONE]")
        assert instance.wait_exit() == 0
        assert_nothing_left(instance)


def test_a_stream_that_outlives_the_timeout_is_cut_and_systemd_knows_how_long() -> None:
    """vLLM then hangs for ever at 'Waiting for connections to close': killed 10 s after its own timeout."""
    with quick({"FAKE_TOKEN_S": "0.1"}, {"stop": {"shutdown_timeout_s": 1, "kill_timeout_s": 3}}) as instance:
        instance.wait_ready()
        with contextlib.closing(open_stream(instance, 1000)):
            asked = time.monotonic()
            instance.signal(signal.SIGTERM)
            assert instance.wait_exit() == 0
            took = time.monotonic() - asked
        assert 10 < took < 16
        assert extends(instance)[-1][1] > asked + took
        assert_nothing_left(instance)


def test_a_stop_while_the_engine_dies_by_itself_is_no_failure() -> None:
    """The exit that was asked for came from somebody else: systemd's own SIGTERM to the whole control group."""
    with quick() as instance:
        instance.wait_ready()
        instance.signal(signal.SIGTERM)
        with contextlib.suppress(AssertionError, ProcessLookupError):
            instance.kill_engine("vllm", signal.SIGTERM)
        assert instance.wait_exit() == 0
        assert_nothing_left(instance)


def test_a_stop_that_arrives_with_the_failure_keeps_the_failure() -> None:
    with quick() as instance:
        instance.wait_ready()
        instance.kill_engine("vllm")
        instance.wait_notify(lambda message: message.get("STOPPING") == "1")
        with contextlib.suppress(ProcessLookupError):
            instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 70
        assert instance.last_json()["error"]["code"] == "engine_exited"
        assert_nothing_left(instance)


UNKILLABLE = """
from vllmd.instance.engine_life import EngineLife
from vllmd.system.processfamily import ProcessFamily
ProcessFamily.kill = lambda self: None
async def never(self, timeout_s):
    return False
ProcessFamily.wait_empty = never
"""


def test_a_process_that_cannot_be_killed_is_an_exit_with_75_and_stays_on_record() -> None:
    """In state D, in a driver's call: the next start has to find it."""
    with Tampered.quick(UNKILLABLE) as instance:
        instance.wait_ready()
        instance.kill_engine("vllm")
        assert instance.wait_exit() == 75
        assert "processes cannot be killed" in instance.log()
        assert instance.last_json()["status"] == 75
        assert instance.last_json()["error"]["code"] == "engine_exited", "the first failure stays the reason"
        assert (instance.state / "launch.json").exists()
