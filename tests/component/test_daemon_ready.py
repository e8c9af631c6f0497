"""READY=1: once, and only when a model that was verified answers its task, from a listener of ours."""

from __future__ import annotations

import signal

import pytest

from tests.component.daemons import assert_nothing_left, ends, extends, first, hold, quick, stop
from tests.harness import Instance

pytestmark = pytest.mark.component


def tokens_computed(instance: Instance) -> float:
    text = instance.ask("/metrics")[1]
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:generation_tokens_total"))


@pytest.mark.parametrize("cgroup", [False, True], ids=["processes", "cgroup"])
def test_ready_comes_once_after_a_token_was_computed(cgroup: bool) -> None:
    with quick(cgroup=cgroup) as instance:
        ready = instance.wait_ready()
        assert tokens_computed(instance) >= 1
        assert ready.pid == instance.pid
        assert ready.get("STATUS") == f"Serving tiny at http://127.0.0.1:{instance.port}"
        stop(instance)
        assert instance.notify.told("READY") == ["1"]
        assert instance.last_json()["error"] is None


def test_status_tells_the_phases_in_their_order() -> None:
    with quick({"FAKE_START_S": "1.5"}) as instance:
        instance.wait_ready()
        told = instance.notify.told("STATUS")
        wanted = ["Checking the host", "Resolving the model", "Starting: loading-weights", "Serving tiny"]
        places = [next(i for i, text in enumerate(told) if text.startswith(word)) for word in wanted]
        assert places == sorted(places), told
        assert any("%" in text for text in told), told
        stop(instance)
        assert instance.notify.told("STATUS")[-1] == "Stopped"


@pytest.mark.parametrize(("task", "said"), [("embed", "one vector"), ("score", "one score")])
def test_other_tasks_are_proved_by_their_own_requests(task: str, said: str) -> None:
    with quick(task=task) as instance:
        instance.wait_ready()
        assert f"proof of life: {said}" in instance.log()


def test_a_reduced_proof_asks_for_health_alone() -> None:
    with quick({"FAKE_COMPLETIONS": "500"}, {"start": {"proof": "health"}}) as instance:
        instance.wait_ready()
        assert tokens_computed(instance) == 0


def test_ready_waits_for_the_verification_of_every_byte() -> None:
    instance = quick(config={"model": {"verify": "sha256"}})
    gate = hold(instance, "verify")
    with instance:
        instance.wait_state("proven")
        assert tokens_computed(instance) >= 1
        assert "READY" not in {name for message in instance.notify.messages for name in message.fields}
        gate.touch()
        instance.wait_ready()
        stop(instance)


def test_a_flipped_byte_is_no_ready() -> None:
    with quick(config={"model": {"verify": "sha256"}}) as instance:
        instance.wait_ready()
        stop(instance)
        weights = sorted((instance.root / "model-generate").glob("*.safetensors"))[-1]
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        instance.start()
        error = ends(instance, 65, "model_changed", ready=False)
        assert weights.name in error["what"]


def test_nothing_is_extended_while_ready_and_a_stop_is_told_at_once() -> None:
    with quick() as instance:
        ready = instance.wait_ready()
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0
        stopping = first(instance, "STOPPING")
        assert not [at for at, _ in extends(instance) if ready.at < at < stopping.at]
        bound = [until - at for at, until in extends(instance) if at >= stopping.at]
        # --shutdown-timeout 30, 10 s more for an engine that hangs, 15 s for the kill: systemd must wait that long.
        assert bound
        assert bound[0] >= 55
        assert_nothing_left(instance)
