"""The watch over an engine and time that nobody lived through: suspends, standstills, overdue looks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.watched import IDLE, Watched, busy, idle, moving
from vllmd.core.liveness import Limits, Liveness
from vllmd.core.pulse import Outcome, Rank, Sample

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("gap", "slept"), [(3600.0, 3600.0), (0.0, 3600.0)], ids=["both clocks", "boot clock"])
def test_a_suspend_begins_everything_anew(gap: float, slept: float) -> None:
    watched = Watched()
    moving(watched)
    watched.read(59, r0=busy(104))
    assert watched.liveness.look(watched.now, watched.now, watched.now) == ""
    watched.now += gap
    assert watched.liveness.look(watched.now, watched.now + slept, 1.0)
    watched.read(59, r0=busy(104))
    assert watched.found == []


def test_time_in_which_we_stood_still_counts_for_nobody_and_nothing_else_is_forgotten() -> None:
    watched = Watched()
    moving(watched)
    watched.read(50, r0=busy(104))
    watched.liveness.look(watched.now, watched.now, watched.now)
    watched.now += 3000
    assert watched.liveness.look(watched.now, watched.now, 1.0)
    watched.read(10, r0=busy(104))
    assert watched.found == []
    watched.read(1, r0=busy(104))
    assert watched.codes == ["engine_hung"]


def test_a_silence_does_not_grow_while_we_stood_still() -> None:
    watched = Watched()
    moving(watched)
    watched.read(50, "timeout")
    watched.liveness.look(watched.now, watched.now, watched.now)
    watched.now += 3000
    assert watched.liveness.look(watched.now, watched.now, 1.0)
    watched.read(9, "timeout")
    assert watched.found == []
    watched.read(2, "timeout")
    assert watched.codes == ["engine_hung"]


def test_an_idle_time_does_not_grow_while_we_stood_still() -> None:
    watched = Watched()
    idle(watched, 200)
    watched.liveness.look(watched.now, watched.now, watched.now)
    watched.now += 3000
    assert watched.liveness.look(watched.now, watched.now, 1.0)
    watched.read(90, r0=IDLE)
    assert watched.liveness.due(watched.now) == []
    watched.read(15, r0=IDLE)
    watched.canary()


def test_a_proof_of_life_that_was_on_its_way_over_a_gap_means_nothing() -> None:
    watched = Watched()
    idle(watched)
    watched.canary()
    watched.liveness.rebase(watched.now)
    watched.reply("timeout")
    idle(watched, 10)
    assert watched.found == []
    assert watched.liveness.due(watched.now) == []


def test_nobody_sleeps_past_what_becomes_due() -> None:
    watched = Watched()
    last = moving(watched)
    watched.read(30, r0=busy(104))
    assert watched.liveness.next_at(watched.now) == last + 60
    assert watched.liveness.pause_s(5, 1, last + 59.7) == pytest.approx(0.3)
    watched = Watched()
    watched.read(1, r0=IDLE)
    assert watched.liveness.next_at(2) == 301
    assert watched.liveness.next_at(400) == float("inf")
    assert watched.liveness.pause_s(5, 1, 10) == 5


@pytest.mark.parametrize("outcome", ["sleeping", "invalid", "error", "503"])
def test_what_is_overdue_makes_nobody_look_more_often(outcome: Outcome) -> None:
    """A proof of life that nobody may send, or work that nobody can see: it looked fifty times a second."""
    watched = Watched()
    moving(watched)
    watched.read(400, r0=busy(200))
    watched.read(400, outcome)
    assert watched.liveness.pause_s(5, 1, watched.now) >= 1
    watched = Watched()
    idle(watched, 400)
    assert watched.liveness.pause_s(5, 1, watched.now) == 5


def test_zero_switches_a_verdict_off() -> None:
    watched = Watched(Limits(hang_s=0, first_s=300, silent_s=600, canary_interval_s=0, failures=3))
    moving(watched)
    watched.read(5000, r0=busy(104))
    watched.read(5000, "timeout", step=5)
    watched.read(5000, step=5, r0=IDLE)
    assert watched.found == []
    assert watched.liveness.due(watched.now) == []


OUTCOMES: list[Outcome] = ["ok", "absent", "sleeping", "503", "error", "invalid", "refused", "timeout", "reset"]


@given(st.lists(st.tuples(st.sampled_from(OUTCOMES), st.integers(0, 3), st.integers(0, 2), st.floats(0.02, 20)), max_size=80))
def test_no_verdict_without_an_unbroken_stillness(readings: list[tuple[Outcome, int, int, float]]) -> None:
    """Whatever is read: a stall is only ever found when the readings of hang_s before it, those that nobody could read left out, were good, busy and all the same."""
    liveness, now = Liveness(Limits(10, 10, 1e9, 0, 3), 0, 0), 0.0
    still = read_at = 0.0
    last: Rank | None = None
    whole = False
    for outcome, beats, running, step in readings:
        now += step
        rank = Rank(beats, running)
        finding = liveness.scraped(Sample(now, now, outcome, {"0": rank} if outcome == "ok" else {}, now, stopped=False))
        if outcome == "ok":
            still = 0.0 if rank != last else still + (now - read_at if whole else 0.0)
            last, read_at, whole = rank, now, True
        elif outcome in ("timeout", "reset", "absent", "sleeping"):
            whole, still = False, 0.0 if outcome == "sleeping" else still
        if finding is not None:
            assert outcome == "ok"
            assert running
            assert still >= 10 - 1e-6
            whole, still = False, 0.0
