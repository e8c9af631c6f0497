"""An engine that fails: whatever it exits with, the instance ends with its own status, says why, and leaves nothing."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Mapping

import pytest

from tests import procs
from tests.component.daemons import ends, extends, first, quick, stop, watch_for

pytestmark = pytest.mark.component

PROOF = {"start": {"proof_timeout_s": 0.7}}


@pytest.mark.parametrize(
    ("completions", "status", "code", "said"),
    [
        ("400", 70, "proof_failed", "status 400: "),
        ("500", 70, "proof_failed", "status 500: "),
        ("empty", 70, "proof_failed", "no finished choice"),
        ("hang", 75, "proof_timeout", "within 0.7 s"),
    ],
)
def test_health_200_without_a_proof_of_life_is_no_ready(completions: str, status: int, code: str, said: str) -> None:
    with quick({"FAKE_COMPLETIONS": completions}, PROOF) as instance:
        assert said in ends(instance, status, code, ready=False)["what"]


@pytest.mark.parametrize("exit_code", ["0", "1"])
def test_an_exit_while_starting_is_a_failure_with_its_cause(exit_code: str) -> None:
    fake = {"FAKE_START_S": "30", "FAKE_EXIT": f"{exit_code}@1", "FAKE_ERROR": "ValueError: no room for the KV cache"}
    with quick(fake) as instance:
        error = ends(instance, 70, "engine_exited", ready=False)
        assert f"exit status {exit_code}" in error["what"]
        assert "no room for the KV cache" in error["what"]
        last = instance.last_json()
        assert any("no room for the KV cache" in line for line in last["lines"])
        assert last["engine_exit"] == f"exit status {exit_code}"


def test_exit_status_0_of_a_ready_engine_is_a_failure() -> None:
    with quick({"FAKE_EXIT_READY": "0@3"}) as instance:
        error = ends(instance, 70, "engine_exited", ready=True)
        assert "exit status 0" in error["what"]


@pytest.mark.parametrize("cgroup", [False, True], ids=["processes", "cgroup"])
def test_sigkill_of_the_api_server_leaves_no_orphan_and_the_next_start_succeeds(cgroup: bool) -> None:
    """EngineCore and Worker outlive it, holding the GPU's memory (upstream #55510)."""
    with quick(cgroup=cgroup) as instance:
        instance.wait_ready()
        assert len(instance.engine_pids()) >= 4
        killed = time.monotonic()
        instance.kill_engine("vllm")
        error = ends(instance, 70, "engine_exited", ready=True)
        assert "killed by SIGKILL" in error["what"]
        assert first(instance, "STOPPING").at - killed < 5
        instance.start()
        instance.wait_ready()
        stop(instance)


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker"])
def test_the_death_of_a_part_ends_the_whole(victim: str) -> None:
    """/health is 503 at once; the API server would exit with 0 some seconds later."""
    with quick({"FAKE_DEATH_S": "60"}) as instance:
        instance.wait_ready()
        instance.kill_engine(victim)
        error = ends(instance, 70, "engine_died", ready=True)
        assert victim[:15] in error["what"]
        assert "503" in error["what"]


def test_the_death_of_the_engine_core_and_then_exit_0_is_a_failure() -> None:
    with quick({"FAKE_DEATH_S": "0.1"}, {"watch": {"interval_s": 30, "observe": "death"}}) as instance:
        instance.wait_ready()
        instance.kill_engine("VLLM::EngineCore")
        assert "exit status 0" in ends(instance, 70, "engine_exited", ready=True)["what"]


@pytest.mark.parametrize(
    ("fake", "said"),
    [({"FAKE_HEALTH": "503@2"}, "3 times in a row 503"), ({"FAKE_LISTEN": "close@0.3"}, "the listener is gone")],
    ids=["503", "listener closed"],
)
def test_three_explicit_refusals_end_an_engine_that_lives(fake: Mapping[str, str], said: str) -> None:
    with quick(fake) as instance:
        assert said in ends(instance, 70, "engine_unhealthy", ready=True)["what"]


def test_the_number_of_refusals_is_a_setting() -> None:
    with quick({"FAKE_HEALTH": "503@2"}, {"watch": {"failures": 5}}) as instance:
        assert "5 times" in ends(instance, 70, "engine_unhealthy", ready=True)["what"]


def test_an_answer_that_does_not_come_never_ends_an_instance() -> None:
    """Probes that took a timeout for death restarted busy servers. A stopped process accepts, and answers nothing; only
    after watch.hang_timeout_s that is a verdict."""
    with quick(config={"watch": {"interval_s": 0.05, "request_timeout_s": 0.1}}) as instance:
        instance.wait_ready()
        instance.kill_engine("vllm", signal.SIGSTOP)
        watch_for(2, instance, lambda: instance.daemon and instance.daemon.poll() is None)
        instance.kill_engine("vllm", signal.SIGCONT)
        procs.wait_until("an answer", lambda: instance.ask("/health")[0] == 200)
        assert instance.status()["state"] == "ready"
        stop(instance)


def test_other_bad_answers_never_end_an_instance() -> None:
    with quick({"FAKE_HEALTH": "500@2"}, {"watch": {"interval_s": 0.05}}) as instance:
        instance.wait_ready()
        watch_for(1, instance, lambda: instance.daemon and instance.daemon.poll() is None)
        assert instance.status()["state"] == "ready"


def test_a_full_backlog_is_busy_and_not_dead() -> None:
    """Refused or timed out, while our own listener stands: requests of others fill its queue."""
    with quick(config={"watch": {"interval_s": 0.05, "request_timeout_s": 0.2}}) as instance:
        instance.wait_ready()
        instance.kill_engine("vllm", signal.SIGSTOP)
        with contextlib.ExitStack() as stack:
            for _ in range(50):
                stack.callback((connection := instance.connection()).close)
                connection.request("GET", "/health")
            watch_for(1, instance, lambda: instance.daemon and instance.daemon.poll() is None)
            instance.kill_engine("vllm", signal.SIGCONT)
        assert instance.status()["state"] == "ready"


def test_the_verdict_is_told_before_the_teardown_and_stays_the_reason() -> None:
    """STOPPING=1 comes first: a teardown longer than WatchdogSec= would end in SIGABRT and status 1. The exit by SIGKILL
    that follows is our own doing, and no second failure."""
    with quick({"FAKE_HEALTH": "503@2", "FAKE_STRAY": "ignore"}) as instance:
        instance.wait_ready()
        instance.wait_notify(lambda message: message.get("STOPPING") == "1")
        ends(instance, 70, "engine_unhealthy", ready=True)
        stopping = first(instance, "STOPPING")
        assert stopping.get("STATUS").startswith("Failed: the engine refuses")
        assert [at for at, _ in extends(instance) if at >= stopping.at]
        assert instance.log().count(" exit_status=") == 1


def test_a_crash_is_told_by_its_signal() -> None:
    with quick() as instance:
        instance.wait_ready()
        instance.kill_engine("vllm", signal.SIGSEGV)
        assert "SIGSEGV" in ends(instance, 70, "engine_bug", ready=True)["what"]
