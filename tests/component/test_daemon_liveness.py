"""What the watch makes of an engine that is slow, busy, asleep, strange or hung in part. With short clocks.

The plain hangs and broken metrics are rows of the fault matrix (test_matrix).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import procs
from tests.component.daemons import Tampered, ends, first, quick, stop, watch_for
from tests.engine.server import UnixConnection
from tests.harness import Instance, merged

pytestmark = pytest.mark.component

WATCH: Mapping[str, Any] = {
    "interval_s": 0.2,
    "request_timeout_s": 0.5,
    "heartbeat_interval_s": 0.1,
    "hang_timeout_s": 1.5,
    "first_request_timeout_s": 1.5,
    "canary_interval_s": 1,
    "canary_timeout_s": 1,
}


def hasty(fake: Mapping[str, str] | None = None, serve: Mapping[str, Any] | None = None, **watch: Any) -> Instance:
    return quick(fake, merged({"watch": WATCH, "serve": serve or {}}, {"watch": watch}))


def lives(instance: Instance) -> bool:
    return instance.daemon is not None and instance.daemon.poll() is None


@contextlib.contextmanager
def asking(instance: Instance, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Iterator[http.client.HTTPConnection]:
    """A request in flight, whose answer nobody waits for."""
    with contextlib.closing(instance.connection(60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps({"model": "tiny", "prompt": "hi", **body}), dict(headers or {}))
        yield connection


def canaries(instance: Instance) -> list[str]:
    return [line for line in instance.log().splitlines() if "proof of life after" in line or "proof of life of rank" in line]


def metric(instance: Instance, name: str) -> float:
    lines = [line for line in instance.ask("/metrics")[1].splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_a_long_prefill_is_no_hang() -> None:
    """It counts no iteration for as long as it lasts; only the KV cache fills."""
    with hasty({"FAKE_TOKEN_S": "0.3"}, canary_interval_s=0) as instance:
        instance.wait_ready()
        steps = metric(instance, "vllm:iteration_tokens_total_count")
        with asking(instance, {"prompt": [5] * 200_000, "max_tokens": 2}):
            watch_for(4.5, instance, lambda: lives(instance))
            assert metric(instance, "vllm:iteration_tokens_total_count") == steps
        stop(instance)


def test_steps_that_take_nearly_the_timeout_are_no_hang() -> None:
    with hasty({"FAKE_TOKEN_S": "3.3"}, canary_interval_s=0) as instance:  # 1.1 s, at three times the speed
        instance.wait_ready()
        with asking(instance, {"max_tokens": 100}):
            watch_for(5, instance, lambda: lives(instance))
        stop(instance)


def test_a_first_request_may_take_longer_than_others() -> None:
    with hasty({"FAKE_TOKEN_S": "6.6"}, canary_interval_s=0, first_request_timeout_s=20) as instance:
        instance.wait_ready()
        with asking(instance, {"max_tokens": 1}):
            watch_for(1.9, instance, lambda: lives(instance))
        assert lives(instance)


def test_a_burst_of_requests_is_no_hang_and_gets_no_proof_of_life() -> None:
    with hasty({"FAKE_TOKEN_S": "0.03"}, canary_interval_s=0.5) as instance, contextlib.ExitStack() as stack:
        instance.wait_ready()
        prompted = metric(instance, "vllm:prompt_tokens_total")
        for _ in range(320):
            stack.enter_context(asking(instance, {"max_tokens": 1000, "prompt": "a"}))
        procs.wait_until("all of them", lambda: metric(instance, "vllm:num_requests_waiting") == 320 - 256)
        one = (metric(instance, "vllm:prompt_tokens_total") - prompted) / 256
        watch_for(3, instance, lambda: lives(instance))
        assert metric(instance, "vllm:prompt_tokens_total") == prompted + 256 * one, "a prompt of somebody else came in"


@pytest.mark.parametrize(("front", "ends_it"), [("busy@2", False), ("stuck@2", True)])
def test_a_server_that_answers_nobody_is_hung_only_where_it_does_not_compute(front: str, ends_it: bool) -> None:
    with hasty({"FAKE_FRONT": front}, canary_interval_s=0) as instance:
        instance.wait_ready()
        if ends_it:
            assert "uses no CPU" in ends(instance, 75, "engine_hung", ready=True)["what"]
        else:
            watch_for(4, instance, lambda: lives(instance))


def test_a_server_that_computes_for_ever_is_hung_in_the_end() -> None:
    with hasty({"FAKE_FRONT": "busy@2"}, canary_interval_s=0, silent_timeout_s=3) as instance:
        instance.wait_ready()
        assert "computes all the while" in ends(instance, 75, "engine_hung", ready=True)["what"]


def test_a_sleeping_engine_is_left_alone() -> None:
    with hasty({"FAKE_METRICS": "sleeping"}) as instance:
        instance.wait_ready()
        instance.kill_engine("VLLM::EngineCore", signal.SIGSTOP)
        watch_for(3, instance, lambda: lives(instance))


def test_an_engine_that_was_told_to_stand_still_is_left_alone() -> None:
    """vLLM's /pause, in dev mode, with requests in flight: whoever trains does so for minutes."""
    with hasty({"FAKE_PAUSED": "yes", "FAKE_TOKEN_S": "0.06"}) as instance:
        instance.wait_ready()
        with asking(instance, {"max_tokens": 2000}):
            time.sleep(0.5)
            instance.kill_engine("VLLM::EngineCore", signal.SIGSTOP)
            procs.wait_until("a word about it", lambda: "left alone, because /is_paused says so" in instance.log())
            watch_for(1, instance, lambda: lives(instance))


# Data-parallel ranks.

RANKS = {"data_parallel_size": 2}


def test_a_dead_rank_under_load_is_named_though_the_other_is_well() -> None:
    with hasty({"FAKE_TOKEN_S": "0.06", "FAKE_DEAD_RANK": "1@1"}, RANKS, canary_interval_s=0) as instance:
        instance.wait_ready()
        with asking(instance, {"max_tokens": 2000}, {"x-data-parallel-rank": "0"}), asking(instance, {"max_tokens": 2000}, {"x-data-parallel-rank": "1"}):
            error = ends(instance, 75, "engine_hung", ready=True)
        assert "rank 1" in error["what"]
        assert "1 of 2 ranks are well" in error["what"]


def test_a_dead_rank_that_is_idle_is_found_by_a_proof_of_life_of_its_own() -> None:
    with hasty({"FAKE_TOKEN_S": "0.06", "FAKE_DEAD_RANK": "1@1"}, RANKS) as instance:
        instance.wait_ready()
        with asking(instance, {"max_tokens": 2000}, {"x-data-parallel-rank": "0"}):
            error = ends(instance, 75, "engine_hung", ready=True)
        assert "rank 1" in error["what"]
        assert "proof of life" in error["what"]


# Proofs of life.


def test_server_errors_end_it_only_after_several_in_a_row() -> None:
    with hasty({"FAKE_COMPLETIONS": "500@2"}, failures=2) as instance:
        instance.wait_ready()
        error = ends(instance, 70, "engine_unhealthy", ready=True)
        assert "2 proofs of life in a row" in error["what"]
        assert "status 500" in error["what"]
        assert len(canaries(instance)) == 2


def test_a_proof_of_life_that_is_refused_ends_nothing() -> None:
    with hasty({"FAKE_COMPLETIONS": "400@2"}, failures=1) as instance:
        instance.wait_ready()
        procs.wait_until("two refusals", lambda: len(canaries(instance)) >= 2)
        assert lives(instance)
        stop(instance)


def test_an_observed_detector_ends_nothing_and_says_what_it_would_have_done() -> None:
    with hasty(observe="hang, canary", hang_timeout_s=1) as instance:
        instance.wait_ready()
        instance.kill_engine("VLLM::EngineCore", signal.SIGSTOP)
        procs.wait_until("a would-be verdict", lambda: "would end the instance (canary only observes)" in instance.log())
        watch_for(0.5, instance, lambda: lives(instance))
        instance.kill_engine("VLLM::EngineCore", signal.SIGCONT)
        stop(instance)


def test_an_engine_without_metrics_is_said_to_be_watched_in_part() -> None:
    with hasty({"FAKE_METRICS": "absent"}) as instance:
        instance.wait_ready()
        procs.wait_until("a warning", lambda: "shows no heartbeat in its metrics" in instance.log())
        watch_for(1.5, instance, lambda: lives(instance))
        assert instance.log().count("shows no heartbeat in its metrics") == 1
        stop(instance)


# Deaths.


def test_a_helper_that_ends_is_no_death() -> None:
    with hasty({"FAKE_HELPER": "1@1"}) as instance:
        instance.wait_ready()
        before = len(instance.engine_pids())
        procs.wait_until("its end", lambda: len(instance.engine_pids()) < before)
        watch_for(2.5, instance, lambda: lives(instance))
        stop(instance)


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker"])
def test_the_death_of_a_part_is_noticed_whatever_the_interval(victim: str) -> None:
    with hasty({"FAKE_DEATH_S": "60"}, interval_s=30) as instance:
        instance.wait_ready()
        time.sleep(0.2)
        instance.kill_engine(victim)
        killed = time.monotonic()
        assert victim[:15] in ends(instance, 70, "engine_died", ready=True)["what"]
        assert first(instance, "STOPPING").at - killed < 2


# Clocks.


def test_a_supervisor_that_was_stopped_begins_anew() -> None:
    with hasty({"FAKE_TOKEN_S": "0.06"}, hang_timeout_s=2, first_request_timeout_s=2) as instance:
        instance.wait_ready()
        with asking(instance, {"max_tokens": 2000}):
            time.sleep(0.5)
            instance.signal(signal.SIGSTOP)
            instance.kill_engine("VLLM::EngineCore", signal.SIGSTOP)
            time.sleep(4)
            instance.signal(signal.SIGCONT)
            procs.wait_until("the gap", lambda: "the supervisor stood still for" in instance.log())
            instance.kill_engine("VLLM::EngineCore", signal.SIGCONT)
            watch_for(3, instance, lambda: lives(instance))


SLEPT = """
import os, vllmd.system.host as host
real = host.boottime
host.boottime = lambda: real() + (3600 if os.path.exists({gate!r}) else 0)
"""


def test_a_suspend_of_the_machine_begins_everything_anew() -> None:
    hang_s = 2.0
    watch = {**WATCH, "hang_timeout_s": hang_s, "first_request_timeout_s": hang_s}
    instance = Tampered.quick(fake={"FAKE_TOKEN_S": "0.06"}, watch=watch)
    gate = instance.root / "gate"
    instance.patch = SLEPT.format(gate=str(gate))
    with instance:
        instance.wait_ready()
        with asking(instance, {"max_tokens": 2000}):
            time.sleep(0.5)
            instance.kill_engine("VLLM::EngineCore", signal.SIGSTOP)
            time.sleep(hang_s / 2)
            slept = time.monotonic()
            gate.touch()
            ends(instance, 75, "engine_hung", ready=True)
        assert "the machine slept for 3600 s" in instance.log()
        assert first(instance, "STOPPING").at - slept >= hang_s


def test_a_paused_engine_gets_no_proof_of_life() -> None:
    with hasty(canary_interval_s=0.6) as instance:
        instance.wait_ready()
        with contextlib.closing(UnixConnection(str(instance.runtime / "control.sock"), timeout=5)) as connection:
            connection.request("POST", "/pause", "{}")
            assert connection.getresponse().status == 200
        steps = metric(instance, "vllm:iteration_tokens_total_count")
        watch_for(1.5, instance, lambda: metric(instance, "vllm:iteration_tokens_total_count") == steps)
        assert 'vllmd_paused{name="demo"} 1.0' in instance.control("/metrics")[1]


def test_a_reload_forgets_nothing_and_applies_at_once() -> None:
    """The stillness before it counts, and the clock that is shorter now has run out."""
    with hasty(interval_s=0.5, hang_timeout_s=600, first_request_timeout_s=600, canary_interval_s=0, heartbeat_interval_s=0.5) as instance:
        instance.wait_ready()
        with asking(instance, {"max_tokens": 2000}):
            time.sleep(1.2)
            instance.kill_engine("VLLM::EngineCore", signal.SIGSTOP)
            watch_for(3, instance, lambda: lives(instance))
            instance.config = merged(instance.config, {"watch": {"hang_timeout_s": 2, "first_request_timeout_s": 2}})
            instance.write_config()
            reloaded = time.monotonic()
            instance.signal(signal.SIGHUP)
            ends(instance, 75, "engine_hung", ready=True)
            assert first(instance, "STOPPING").at - reloaded < 1.9


def test_an_engine_without_a_heartbeat_is_watched_by_its_health_and_its_proofs_of_life(tmp_path: Path) -> None:
    """The one of two screens (tests/fakes/mini_engine.py), found as a plug-in."""
    with mini(WATCH) as instance:
        instance.wait_ready()
        watch_for(3, instance, lambda: lives(instance))
        instance.kill_engine("main", signal.SIGSTOP)
        assert "answered nothing" in ends(instance, 75, "engine_hung", ready=True)["what"]


def mini(watch: Mapping[str, Any]) -> Instance:
    instance = quick(config={"watch": watch, "engine": {"name": "mini", "executable": ""}})
    site = instance.root / "site"
    for name in ("vllmd_mini-1.dist-info",):
        (site / name).mkdir(parents=True)
        (site / name / "METADATA").write_text("Metadata-Version: 2.1\nName: vllmd-mini\nVersion: 1\n")
        (site / name / "entry_points.txt").write_text("[vllmd.engines]\nmini = tests.fakes.mini_engine:Mini\n")
    instance.env["PYTHONPATH"] = f"{site}:{Path(__file__).parents[2]}"
    return instance

