"""When an engine is hung, and above all when it is not: single cases. The month is in test_liveness_simulation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.core.liveness import ALONE, Finding, Limits, Liveness
from vllmd.core.pulse import Outcome, Rank, Sample

pytestmark = pytest.mark.unit

LIMITS = Limits(hang_s=60, first_s=300, silent_s=600, canary_interval_s=300, failures=3)
IDLE = Rank(10, succeeded=3)


def busy(beats: float, **more: float) -> Rank:
    return Rank(beats, running=more.get("running", 2), waiting=more.get("waiting", 1), succeeded=more.get("succeeded", 3), others=(more.get("kv", 0.0),))


class Watched:
    """Feeds readings a second apart; `found` collects the verdicts with their time."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.liveness = Liveness(limits, 0.0, 0.0)
        self.now = 0.0
        self.found: list[tuple[float, Finding]] = []

    def read(
        self, seconds: float, outcome: Outcome = "ok", *, step: float = 1.0, cpu: float = 0.0, state: str = "S", **ranks: Rank
    ) -> None:
        """The same reading all the time; `cpu`: cores that the server uses; `state`: the kernel's letter; ranks as r0=, r1=."""
        end = self.now + seconds
        while self.now < end:
            self.now += step
            named = {name.removeprefix("r"): rank for name, rank in ranks.items()}
            self._keep(self.liveness.scraped(Sample(self.now - 0.01, self.now, outcome, named, cpu * self.now, state == "T", state == "R")))

    def _keep(self, finding: Finding | None) -> None:
        if finding is not None:
            self.found.append((self.now, finding))

    def canary(self, name: str = "0") -> None:
        """One is due; it is sent, and the deadline passes."""
        assert self.liveness.due(self.now) == [name]
        self.sent = self.liveness.asked(name, self.now)

    def reply(self, reply: str, name: str = "0", *, computing: bool = False) -> None:
        self._keep(self.liveness.replied(name, self.sent, reply, self.now, detail="status 500", computing=computing))  # type: ignore[arg-type]

    @property
    def codes(self) -> list[str]:
        return [finding.code for _, finding in self.found]


def moving(watched: Watched, seconds: int = 5) -> float:
    """Work that goes on; the time of the last movement."""
    for beat in range(seconds):
        watched.read(1, r0=busy(100 + beat))
    return watched.now


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


# Proofs of life.


def idle(watched: Watched, seconds: float = 301) -> None:
    watched.read(seconds, r0=IDLE)


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


# Clocks.


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
