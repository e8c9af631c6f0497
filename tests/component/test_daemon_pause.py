"""A pause: nothing is judged or ended while a person works; it is seen everywhere, and ends by itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from typing import Any

import pytest

from tests import procs
from tests.component.daemons import Tampered, ends, quick, stop, watch_for
from tests.engine.server import UnixConnection
from tests.harness import Instance
from vllmd.system.peer import peer_of

pytestmark = pytest.mark.component

SOON = {"watch": {"hang_timeout_s": 1, "first_request_timeout_s": 1, "heartbeat_interval_s": 0.1}}


def post(instance: Instance, path: str, body: Any = None, *, raw: bytes = b"") -> tuple[int, str]:
    with contextlib.closing(UnixConnection(str(instance.runtime / "control.sock"), timeout=5)) as connection:
        connection.request("POST", path, raw or json.dumps(body or {}))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def vllmctl(instance: Instance, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [os.sys.executable, "-c", "import sys; from vllmd.ctl import main; sys.exit(main())", "--root", str(instance.root), *arguments]  # type: ignore[attr-defined]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)


def lives(instance: Instance) -> bool:
    return instance.daemon is not None and instance.daemon.poll() is None


def test_a_paused_instance_is_not_ended_for_a_hang_and_says_so_everywhere() -> None:
    with quick(config=SOON) as instance:
        instance.wait_ready()
        paused = vllmctl(instance, "pause", instance.name, "--for", "10min", "--why", "strace\n of the core")
        assert paused.returncode == 0, paused.stderr
        instance.kill_engine("vllm", signal.SIGSTOP)
        procs.wait_until("a verdict that ends nothing", lambda: "would end the instance (the instance is paused)" in instance.log())
        watch_for(0.5, instance, lambda: lives(instance))
        shown = instance.status()["paused"]
        assert shown["why"] == "strace of the core"
        assert shown["by"] == f"uid {os.getuid()}"
        assert any(told.startswith("Paused until ") for told in instance.notify.told("STATUS"))
        assert "strace of the core" in vllmctl(instance, "status", instance.name).stdout
        assert "[paused until " in vllmctl(instance, "status").stdout
        instance.kill_engine("vllm", signal.SIGCONT)
        assert vllmctl(instance, "resume", instance.name).returncode == 0
        assert instance.status()["paused"] is None
        watch_for(1.5, instance, lambda: lives(instance))
        stop(instance)


def test_a_pause_ends_by_itself_and_what_still_holds_is_judged_then() -> None:
    with quick(config=SOON) as instance:
        instance.wait_ready()
        assert post(instance, "/pause", {"for_s": 8})[0] == 200
        instance.kill_engine("vllm", signal.SIGSTOP)
        procs.wait_until("a verdict that ends nothing", lambda: "the instance is paused" in instance.log())
        assert lives(instance)
        ends(instance, 75, "engine_hung", ready=True)
        assert "the watch goes on (its time is over)" in instance.log()


SLEPT = """
import os, vllmd.system.host as host
real = host.boottime
host.boottime = lambda: real() + (3600 if os.path.exists({gate!r}) else 0)
import vllmd.instance.pausing as pausing
pausing.CHECK_S = 0.2
"""


def test_a_pause_ends_at_its_time_also_when_the_machine_slept_meanwhile() -> None:
    """The timers of the loop do not count that time, and what is shown as its end would long be past."""
    instance = Tampered.quick()
    gate = instance.root / "gate"
    instance.patch = SLEPT.format(gate=str(gate))
    with instance:
        instance.wait_ready()
        assert post(instance, "/pause", {"for_s": 3500})[0] == 200
        watch_for(0.5, instance, lambda: instance.status()["paused"] is not None)
        gate.touch()
        procs.wait_until("its end", lambda: "the watch goes on (its time is over)" in instance.log())
        stop(instance)


def test_an_engine_that_ends_while_paused_ends_the_instance_at_the_end_of_the_pause() -> None:
    with quick() as instance:
        instance.wait_ready()
        assert post(instance, "/pause")[0] == 200
        instance.kill_engine("vllm")
        procs.wait_until("it to be known", lambda: "killed by SIGKILL" in instance.status()["paused"]["pending"])
        watch_for(0.5, instance, lambda: lives(instance))
        assert post(instance, "/resume")[0] == 200
        assert "killed by SIGKILL" in ends(instance, 70, "engine_exited", ready=True)["what"]


def test_a_stop_goes_on_while_paused() -> None:
    with quick() as instance:
        instance.wait_ready()
        assert post(instance, "/pause")[0] == 200
        stop(instance)


def test_a_stop_waits_for_nothing_where_the_engine_has_ended_while_paused() -> None:
    """Its end was told during the pause, and is told no second time."""
    with quick() as instance:
        instance.wait_ready()
        assert post(instance, "/pause")[0] == 200
        instance.kill_engine("vllm")
        procs.wait_until("it to be known", lambda: "killed by SIGKILL" in instance.status()["paused"]["pending"])
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit(5) == 0


def test_a_start_can_be_paused_and_systemd_is_told_to_wait() -> None:
    with quick({"FAKE_START_S": "60", "FAKE_PROGRESS": "none"}, {"start": {"stall_timeout_s": 1}}) as instance:
        instance.wait_state("starting")
        assert post(instance, "/pause", {"for_s": 3000})[0] == 200
        instance.wait_notify(lambda message: int(message.get("EXTEND_TIMEOUT_USEC") or 0) > 2900 * 10**6)
        procs.wait_until("the stall to be known", lambda: "no progress" in instance.status()["paused"]["pending"])
        assert post(instance, "/resume")[0] == 200
        ends(instance, 75, "start_stalled", ready=False)


@pytest.mark.parametrize("body", [{"for_s": 0}, {"for_s": -1}, {"for_s": 1e9}, {"for_s": True}, {"for_s": "1h"}, {"why": 3}, ["x"]])
def test_a_wish_that_makes_no_sense_is_refused(body: Any, paused_instance: Instance) -> None:
    assert post(paused_instance, "/pause", body)[0] == 400


@pytest.fixture(scope="module")
def paused_instance() -> Any:
    with quick() as instance:
        instance.wait_ready()
        yield instance


def test_the_doors_that_a_post_does_not_open(paused_instance: Instance) -> None:
    assert post(paused_instance, "/pause", raw=b"no json")[0] == 400
    assert post(paused_instance, "/pause", raw=b"x" * 20000)[0] == 400
    assert post(paused_instance, "/resume")[0] == 409
    assert post(paused_instance, "/status")[0] == 405
    assert post(paused_instance, "/nothing")[0] == 404
    assert paused_instance.control("/pause")[0] == 405
    refused = vllmctl(paused_instance, "resume", paused_instance.name)
    assert refused.returncode == 75
    assert "not paused" in refused.stderr
    assert vllmctl(paused_instance, "pause", paused_instance.name, "--for", "soon").returncode == 64
    assert vllmctl(paused_instance, "pause", "nobody").returncode == 75


def test_the_kernel_says_who_asks() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        peer = peer_of(left)
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert {os.getgid(), *os.getgroups()} <= peer.gids
    assert peer.is_allowed(-1)
