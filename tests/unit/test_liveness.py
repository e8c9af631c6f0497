"""When an engine is hung, and above all when it is not: single cases. The month is in test_liveness_simulation."""

from __future__ import annotations

import pytest

from tests.watched import IDLE, Watched, busy, moving
from vllmd.core.pulse import Outcome

pytestmark = pytest.mark.unit


def test_work_without_movement_is_a_hang_after_the_timeout_and_not_before() -> None:
    watched = Watched()
    last = moving(watched)
    watched.read(59, r0=busy(104))
    assert watched.found == []
    watched.read(1, r0=busy(104))
    (at, finding), *more = watched.found
    assert (at - last, finding.code, more) == (60, "engine_hung", [])
    assert "60 s" in finding.what
    assert finding.still_s == 60
    assert "2 requests running and 1 waiting" in finding.what


def test_an_idle_engine_does_not_hang() -> None:
    watched = Watched()
    watched.read(100_000, step=5, r0=IDLE)
    assert watched.found == []


@pytest.mark.parametrize("change", [{"kv": 0.5}, {"running": 3}, {"waiting": 2}, {"succeeded": 4}])
def test_any_figure_of_the_rank_is_movement(change: dict[str, float]) -> None:
    """A long prompt in chunks moves the KV cache alone: vLLM counts no iteration without output."""
    watched = Watched()
    moving(watched)
    watched.read(59, r0=busy(104))
    watched.read(59, r0=busy(104, **change))
    assert watched.found == []


def test_a_live_rank_does_not_hide_a_dead_one() -> None:
    watched = Watched()
    for beat in range(100):
        watched.read(1, r0=busy(beat), r1=busy(min(beat, 30)))
    (at, finding), *more = watched.found
    assert at == 31 + 60
    assert more == []
    assert "rank 1" in finding.what
    assert "1 of 2 ranks are well" in finding.what


@pytest.mark.parametrize("every", [3, 30])
def test_a_dead_rank_that_some_readings_lack_is_found(every: int) -> None:
    """It was forgotten with each of them, and began anew when it was shown again."""
    watched = Watched()
    for beat in range(400):
        if beat > 10 and beat % every == 0:
            watched.read(1, r0=busy(beat))
        else:
            watched.read(1, r0=busy(beat), r1=busy(min(beat, 5)))
    at, finding = watched.found[0]
    assert "rank 1" in finding.what
    assert at <= 6 + 60 * every / (every - 2) + every, "only the time between two readings that show it counts"


def test_a_dead_rank_is_found_though_some_readings_show_no_rank_at_all() -> None:
    watched = Watched()
    moving(watched)
    for _ in range(4):
        watched.read(29, r0=busy(104))
        watched.read(1, "absent")
    assert watched.codes == ["engine_hung"]
    assert watched.found[0][0] <= 5 + 60 + 3 * 2


def test_a_rank_that_stays_away_is_given_up_and_gets_no_verdict_and_no_request() -> None:
    """Elastic data parallelism takes ranks away; 300 s are longer than a reading can lack one by accident."""
    watched = Watched()
    gone: list[tuple[str, ...]] = []
    for beat in range(10):
        watched.read(1, r0=busy(beat), r1=busy(beat))
    for beat in range(10, 400):
        watched.read(1, r0=busy(beat))
        assert watched.liveness.due(watched.now) == []
        gone += [watched.liveness.gone] * bool(watched.liveness.gone)
    assert gone == [("1",)]
    assert set(watched.liveness.pulses) == {"0"}
    assert watched.found == []


def test_the_first_request_may_take_longer() -> None:
    watched = Watched()
    watched.read(5, r0=IDLE)
    watched.read(300, r0=busy(10))
    assert watched.found == []
    watched.read(2, r0=busy(10))
    assert watched.codes == ["engine_hung"]
    assert "first_request_timeout_s" in watched.found[0][1].hint


def test_a_counter_that_begins_anew_is_a_new_beginning() -> None:
    watched = Watched()
    moving(watched)
    watched.read(50, r0=busy(104))
    watched.read(50, r0=busy(3))
    assert watched.found == []


@pytest.mark.parametrize("outcome", ["timeout", "reset"])
def test_time_in_which_nothing_was_read_counts_for_nobody(outcome: Outcome) -> None:
    """The server's event loop was blocked: the figures that it shows first are as old as its silence."""
    watched = Watched()
    moving(watched)
    watched.read(30, r0=busy(104))
    watched.read(55, outcome, cpu=1.0)
    watched.read(29, r0=busy(104))
    assert watched.found == []


def test_a_server_that_is_busy_is_not_hung_though_it_answers_nobody() -> None:
    watched = Watched()
    moving(watched)
    watched.read(590, "timeout", cpu=0.9)
    assert watched.found == []
    watched.read(20, "timeout", cpu=0.9)
    assert watched.codes == ["engine_hung"]
    assert "computes" in watched.found[0][1].what


def test_a_server_that_does_not_compute_is_hung_after_the_timeout() -> None:
    watched = Watched()
    last = moving(watched)
    watched.read(61, "timeout", cpu=0.01)
    assert watched.codes == ["engine_hung"]
    assert watched.found[0][0] - last <= 62
    assert "uses no CPU" in watched.found[0][1].what


def test_a_server_that_gets_no_processor_is_not_hung() -> None:
    watched = Watched()
    moving(watched)
    watched.read(300, "timeout", cpu=0.01, state="R")
    assert watched.found == []


def test_a_stopped_server_is_named_whatever_others_compute() -> None:
    watched = Watched()
    moving(watched)
    watched.read(62, "timeout", cpu=4.0, state="T")
    assert watched.codes == ["engine_hung"]
    assert "stopped" in watched.found[0][1].what


@pytest.mark.parametrize("outcome", ["503", "error", "invalid", "absent"])
def test_any_answer_ends_a_silence(outcome: Outcome) -> None:
    watched = Watched()
    for _ in range(10):
        watched.read(50, "timeout")
        watched.read(1, outcome)
    for _ in range(10):
        watched.read(50, "timeout")
        watched.liveness.answered()
    assert watched.found == []


def test_sleeping_engines_get_no_verdict_and_no_request() -> None:
    watched = Watched()
    moving(watched)
    watched.read(5000, "sleeping", step=5)
    assert watched.found == []
    assert watched.liveness.due(watched.now) == []
    watched.read(250, r0=busy(104))  # the first request after it has woken may compile
    assert watched.found == []


