"""The clocks of a start, and the row of refusals that ends a ready engine."""

from __future__ import annotations

import pytest

from vllmd.core.health import Refusals
from vllmd.core.progress import StartClock

pytestmark = pytest.mark.unit


def clock(stall_s: float = 10, start_s: float = 100) -> StartClock:
    return StartClock.begin(0.0, stall_s=stall_s, start_s=start_s)


def test_silence_stalls() -> None:
    assert clock().verdict(9.9) == ""
    assert clock().verdict(10) == "stalled"


def test_a_new_phase_resets_the_stall_clock() -> None:
    moved = clock().line(9, "loading-weights", None)
    assert moved.stalls_at == 19


def test_the_same_phase_again_is_weak() -> None:
    moved = clock().line(1, "a", None).line(2, "b", None).line(9, "a", None)
    assert moved.strong_at == 2
    assert moved.stalls_at == 19


def test_weak_progress_stretches_to_three_times_and_no_more() -> None:
    ticking = clock()
    for second in range(1, 60):
        ticking = ticking.weak(float(second))
    assert ticking.stalls_at == 30
    assert ticking.verdict(30) == "stalled"


def test_a_percentage_that_grows_is_strong_and_one_that_repeats_is_not() -> None:
    grown = clock().line(1, "loading", 0.1).line(5, "", 0.2)
    assert grown.strong_at == 5
    assert grown.line(6, "", 0.2).strong_at == 5


def test_whatever_moves_the_start_deadline_ends_it() -> None:
    moving = clock(start_s=20)
    for second in range(1, 20):
        moving = moving.line(float(second), f"phase {second}", None)
    assert moving.verdict(19.9) == ""
    assert moving.verdict(20) == "expired"


def row(*answers: tuple[str, int, bool]) -> Refusals:
    refusals = Refusals(limit=3)
    for outcome, status, listening in answers:
        refusals = refusals.after(outcome, status, listening=listening)
    return refusals


def test_three_503_in_a_row_end_it() -> None:
    assert not row(("answered", 503, True), ("answered", 503, True)).reached
    assert row(*[("answered", 503, True)] * 3).reached


def test_refused_counts_only_when_nobody_listens() -> None:
    assert row(*[("refused", 0, False)] * 3).reached
    assert not row(*[("refused", 0, True)] * 9).reached


@pytest.mark.parametrize("harmless", [("timeout", 0, True), ("answered", 200, True), ("reset", 0, True), ("invalid", 0, True)])
def test_a_slow_or_good_answer_breaks_the_row(harmless: tuple[str, int, bool]) -> None:
    bad = ("answered", 503, True)
    assert not row(bad, bad, harmless, bad, bad).reached
    assert not row(*[harmless] * 9).reached
