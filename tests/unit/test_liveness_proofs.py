"""Proofs of life: who is asked, when, and what a proof that does not come means."""

from __future__ import annotations

import pytest

from tests.watched import IDLE, Watched, busy, idle
from vllmd.core.liveness import ALONE, Limits
from vllmd.core.pulse import Rank, Sample

pytestmark = pytest.mark.unit


def test_only_an_idle_engine_is_asked_and_only_after_the_interval() -> None:
    watched = Watched()
    watched.read(1, r0=IDLE)
    watched.read(298, r0=IDLE)
    assert watched.liveness.due(watched.now) == []
    watched.read(2, r0=IDLE)
    assert watched.liveness.due(watched.now) == ["0"]
    for outcome in ("timeout", "error", "invalid", "503", "refused", "sleeping"):
        watched.read(1, outcome)
        assert watched.liveness.due(watched.now) == [], outcome
    for beat in range(600):
        watched.read(1, r0=busy(11 + beat))
        assert watched.liveness.due(watched.now) == []


def test_work_that_stands_still_gets_no_proof_of_life_either() -> None:
    """Nobody knows yet whether it hangs; a request more would wait behind the others."""
    watched = Watched(Limits(hang_s=1e6, first_s=1e6, silent_s=1e6, canary_interval_s=300, failures=3))
    watched.read(1000, r0=busy(10))
    assert watched.liveness.due(watched.now) == []


def test_requests_that_succeed_are_proof_enough() -> None:
    watched = Watched()
    for hundred in range(10):
        watched.read(100, r0=Rank(10 + hundred, succeeded=hundred))
        assert watched.liveness.due(watched.now) == []


def test_figures_that_move_without_requests_prove_nothing() -> None:
    watched = Watched()
    for beat in range(302):
        watched.read(1, r0=Rank(beat, others=(float(beat),)))
    watched.canary()
    for beat in range(60):
        watched.read(1, r0=Rank(302 + beat, others=(302.0 + beat,)))
    watched.reply("timeout")
    watched.read(1, r0=Rank(400, others=(400.0,)))
    assert watched.codes == ["engine_hung"]


def test_a_proof_that_comes_is_proof_for_an_interval() -> None:
    watched = Watched()
    idle(watched)
    watched.canary()
    watched.read(1, r0=IDLE)
    watched.reply("ok")
    watched.read(299, r0=IDLE)
    assert watched.liveness.due(watched.now) == []
    watched.read(2, r0=IDLE)
    assert watched.liveness.due(watched.now) == ["0"]


def test_a_proof_that_does_not_come_is_a_hang_when_nothing_has_moved() -> None:
    watched = Watched()
    idle(watched)
    watched.canary()
    watched.read(60, r0=IDLE)
    watched.reply("timeout")
    assert watched.found == []  # the reading right after it decides
    watched.read(1, r0=IDLE)
    assert watched.codes == ["engine_hung"]
    assert "within 60 s" in watched.found[0][1].what


def test_a_reading_that_was_asked_for_before_the_deadline_decides_nothing() -> None:
    watched = Watched()
    idle(watched)
    watched.canary()
    watched.read(60, r0=IDLE)
    watched.reply("timeout")
    early = Sample(watched.now - 2, watched.now + 2, "ok", {"0": IDLE})
    assert watched.liveness.scraped(early) is None


def test_a_proof_that_is_late_because_requests_came_in_is_no_verdict() -> None:
    watched = Watched()
    idle(watched)
    watched.canary()
    for beat in range(60):
        watched.read(1, r0=busy(11 + beat, running=256, waiting=1024))
    watched.reply("timeout")
    watched.read(1, r0=busy(71, running=256, waiting=1024))
    assert watched.found == []


def test_a_proof_that_is_lost_while_nobody_was_answered_is_asked_again() -> None:
    watched = Watched()
    idle(watched)
    watched.canary()
    watched.read(60, "timeout", cpu=1.0)
    watched.reply("timeout")
    watched.read(60, "timeout", cpu=1.0)
    assert watched.found == []
    watched.read(1, r0=IDLE)
    assert watched.found == []
    assert watched.liveness.due(watched.now) == []
    watched.read(5, r0=IDLE)
    watched.canary()  # once more
    watched.read(60, r0=IDLE)
    watched.reply("timeout")
    watched.read(1, r0=IDLE)
    assert watched.codes == ["engine_hung"]


@pytest.mark.parametrize("anew", [Rank(0), Rank(10, succeeded=0)], ids=["beats", "requests"])
def test_a_proof_that_was_on_its_way_while_the_counters_began_anew_means_nothing(anew: Rank) -> None:
    """Whoever counts from nothing began anew itself, and never saw the question."""
    watched = Watched()
    idle(watched)
    watched.canary()
    watched.read(30, r0=IDLE)
    watched.read(30, r0=anew)
    watched.reply("timeout")
    watched.read(1, r0=anew)
    assert watched.found == []
    watched.read(240, r0=anew)
    assert watched.liveness.due(watched.now) == []
    watched.read(60, r0=anew)
    watched.canary()


def blinded(watched: Watched) -> None:
    """A proof of life that does not come, and one reading meanwhile that gets no answer."""
    watched.canary()
    watched.read(30, r0=IDLE)
    watched.read(1, "timeout", cpu=1.0)
    watched.read(29, r0=IDLE)
    watched.reply("timeout")
    watched.read(7, r0=IDLE)


def test_one_lost_reading_in_every_proof_of_life_does_not_hide_a_dead_engine_for_ever() -> None:
    watched = Watched()
    idle(watched)
    for _ in range(2):
        blinded(watched)
        assert watched.found == []
    blinded(watched)
    assert watched.codes == ["engine_hung"]


def test_lost_proofs_of_life_count_only_in_a_row() -> None:
    watched = Watched()
    idle(watched)
    for _ in range(3):
        for _ in range(2):
            blinded(watched)
        watched.canary()
        watched.reply("ok")
        watched.read(301, r0=IDLE)
    assert watched.found == []


def test_server_errors_count_only_in_a_row() -> None:
    watched = Watched()
    idle(watched)
    for reply in ("failed", "failed", "ok"):
        watched.canary()
        watched.reply(reply)
        watched.read(6 if reply == "failed" else 301, r0=IDLE)
    assert watched.found == []
    for _ in range(3):
        watched.canary()
        watched.reply("failed")
        watched.read(6, r0=IDLE)
    assert watched.codes == ["engine_unhealthy"]
    assert "status 500" in watched.found[0][1].what


@pytest.mark.parametrize("reply", ["refused", "void"])
def test_a_refused_or_lost_question_is_no_verdict(reply: str) -> None:
    watched = Watched()
    idle(watched)
    for _ in range(10):
        watched.canary()
        watched.reply(reply)
        watched.read(301, r0=IDLE)
    assert watched.found == []


def test_an_engine_without_a_heartbeat_is_asked_too_and_needs_several_silences() -> None:
    watched = Watched()
    for _ in range(3):
        watched.read(301, "absent", step=5)
        watched.canary(ALONE)
        watched.read(60, "absent", step=5)
        watched.reply("timeout", ALONE, computing=True)
    assert watched.found == []
    watched.read(301, "absent", step=5)
    for _ in range(3):
        watched.canary(ALONE)
        watched.read(60, "absent", step=5)
        watched.reply("timeout", ALONE)
        watched.read(10, "absent", step=5)
    assert watched.codes == ["engine_hung"]
