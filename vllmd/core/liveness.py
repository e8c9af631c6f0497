"""Is a ready engine hung? Decided from its heartbeat, from the silence of its server, and from proofs of life when it is idle.

vLLM's /health stays 200 for a hung EngineCore (upstream #39863, #36960, #16259), and probes that send requests to a busy
server, or take a timeout for death, kill healthy ones (ray #54070, gpustack #3189). So: a rank with work whose figures stand
still has stalled; an idle one is asked for one proof of life now and then; a server that answers nobody is hung when it
does not even compute. Time during which nothing could be read counts for nobody.

Nothing here has a clock: every call says when it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vllmd.core.pulse import SILENT, Canary, Pulse, Rank, Sample, Silence

Reply = Literal["ok", "timeout", "failed", "refused", "void"]
"""To a proof of life. `failed`: a 5xx, or a 200 that proves nothing; `refused`: a 4xx; `void`: no connection."""
ALONE = ""
"""The rank of an engine that shows no ranks."""
FLOOR_S = 0.02
SILENT_TIMEOUT_MIN_S = 0.5
RETRY_S = 5.0
"""After a proof of life that failed the next one follows soon: a single 5xx is an accident."""

BLIND = 3
"""So many in a row that got no answer, and during which the server was silent for a moment: that explains one, not each of them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`hang_s` or `canary_interval_s` 0: no such verdict. `first_s` holds until a rank has been seen moving; `silent_s` for a server that answers
    nobody though it computes; `failures` proofs of life in a row that fail end the engine; a look later than `slack_s`
    after its time means that we, or the machine, stood still."""

    hang_s: float
    first_s: float
    silent_s: float
    canary_interval_s: float
    failures: int

    @property
    def slack_s(self) -> float:
        return min(5.0, max(1.0, self.hang_s / 4)) if self.hang_s else 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """`detector`: hang or canary. `code` is the failure's; the texts are for people. `still_s`: how long it has stood still with work."""

    detector: Literal["hang", "canary"]
    code: Literal["engine_hung", "engine_unhealthy"]
    what: str
    hint: str
    still_s: float = 0.0


class Liveness:
    """The order of calls: `look` whenever somebody wakes, then what was learnt (`scraped`, `answered`, `replied`)."""

    def __init__(self, limits: Limits, at: float, boot: float) -> None:
        self.limits = limits
        self.pulses: dict[str, Pulse] = {}
        self.outcome: str = ""
        self.gone: tuple[str, ...] = ()
        """Ranks that the last reading gave up: not shown for longer than a first request may take."""
        self._silence: Silence | None = None
        self._looked = at
        self._boot = boot

    # -- time

    def look(self, at: float, boot: float, planned_s: float) -> str:
        """`planned_s`: how long ago the look before should have been, at most. Not '' when the clocks say that the machine slept:
        then everything is measured from now on; or that we ourselves stood still: that time then counts for nobody."""
        gap, slept = at - self._looked, (boot - self._boot) - (at - self._looked)
        self._looked, self._boot = at, boot
        if slept > 1.0:
            self.rebase(at)
            return f"the machine slept for {slept:.0f} s; everything is measured anew"
        if gap > planned_s + self.limits.slack_s:
            self._skip(gap)
            return f"the supervisor stood still for {gap - planned_s:.0f} s, which count for nobody"
        return ""

    def _skip(self, gap: float) -> None:
        """What was seen before stays true: on a host short of CPU a hang would else be forgotten again and again."""
        if self._silence is not None:
            self._silence.skip(gap)
        for pulse in self.pulses.values():
            pulse.skip(gap)

    def rebase(self, at: float) -> None:
        """Every clock begins anew; proofs of life on their way mean nothing any more."""
        self._silence = None
        for pulse in self.pulses.values():
            pulse.rebase(at)

    def next_at(self, at: float) -> float:
        """When something may become due, so that nobody sleeps past it; infinity where nothing is. What is past was due at the
        reading before, and nobody wanted it: a paused instance gets no proof of life."""
        return min((each for each in self._deadlines() if each > at), default=float("inf"))

    def pause_s(self, idle_s: float, busy_s: float, at: float) -> float:
        """Until the next reading: the shorter one while it is worth a closer look, and never past what becomes due."""
        interval_s = min(idle_s, busy_s) if self.is_busy else idle_s
        return max(FLOOR_S, min(interval_s, self.next_at(at) - at))

    def timeout_s(self, most_s: float, at: float) -> float:
        """Of the next reading: while nobody answers, no longer than until the verdict on that. All readings before the last
        one have their full time: a server that needs four seconds for an answer is slow, not silent."""
        if self._silence is None or not self.limits.hang_s:
            return most_s
        return min(most_s, max(self._silence.quiet_since + self.limits.hang_s - at, SILENT_TIMEOUT_MIN_S))

    def _deadlines(self) -> Iterator[float]:
        if self._silence is not None and self.limits.hang_s:
            yield self._silence.quiet_since + self.limits.hang_s - SILENT_TIMEOUT_MIN_S + FLOOR_S  # the last question ends when the time is up
            yield self._silence.quiet_since + self.limits.hang_s
        for name, pulse in self.pulses.items():
            if pulse.absent_since is not None:
                continue
            if pulse.rank.has_work:
                if self.limits.hang_s and self.outcome == "ok":
                    yield pulse.at + self._limit(pulse) - pulse.still_s
            elif pulse.canary is None and self.limits.canary_interval_s and self._readable(name):
                yield max(pulse.proof_at + self.limits.canary_interval_s, pulse.next_canary_at)

    # -- readings

    @property
    def is_busy(self) -> bool:
        """Worth a closer look: there is work, a silence, or a proof of life on its way."""
        return self._silence is not None or any(pulse.rank.has_work or pulse.canary for pulse in self.pulses.values())

    @property
    def still(self) -> tuple[float, str]:
        """How long the slowest rank has stood still, and which."""
        return max(((pulse.still_s, name) for name, pulse in self.pulses.items()), default=(0.0, ALONE))

    def answered(self) -> None:
        """Somebody got an answer over HTTP, whatever it was."""
        self._silence = None

    def scraped(self, sample: Sample) -> Finding | None:
        self.outcome, self.gone = sample.outcome, ()
        if sample.outcome in SILENT:
            return self._silent(sample)
        if sample.outcome != "refused":
            self._silence = None
        match sample.outcome:
            case "ok":
                return self._read(sample)
            case "absent":
                self._alone(sample)
            case "sleeping":
                self.rebase(sample.at)
                for pulse in self.pulses.values():
                    pulse.moved = False  # the first request after it wakes may compile again
        return None

    def _read(self, sample: Sample) -> Finding | None:
        self._miss(sample, {*sample.ranks})
        if ALONE not in sample.ranks:
            self.pulses.pop(ALONE, None)
        for name, rank in sample.ranks.items():
            pulse = self.pulses.get(name)
            if pulse is None:
                self.pulses[name] = Pulse(rank, sample.at, sample.at)
            else:
                pulse.take(rank, sample.at)
        for name in sample.ranks:
            pulse = self.pulses[name]
            finding = self._stalled(name, pulse) or self._expired(name, pulse, sample)
            if finding is not None:
                pulse.rebase(sample.at)
                return finding
        return None

    def _miss(self, sample: Sample, shown: set[str]) -> None:
        """What was known of a rank stays for a while: one reading without it made a dead one new, and so immortal."""
        patience_s = max(self.limits.hang_s, self.limits.first_s)
        self.gone = tuple(name for name, pulse in self.pulses.items() if name not in {*shown, ALONE} and pulse.miss(sample.at) > patience_s)
        for name in self.gone:
            del self.pulses[name]

    def _alone(self, sample: Sample) -> None:
        self._miss(sample, set())
        if not self.pulses:
            self.pulses = {ALONE: Pulse(Rank(0.0), sample.at, sample.at)}

    def _limit(self, pulse: Pulse) -> float:
        return self.limits.hang_s if pulse.moved else max(self.limits.first_s, self.limits.hang_s)

    def _stalled(self, name: str, pulse: Pulse) -> Finding | None:
        if not self.limits.hang_s or pulse.still_s < self._limit(pulse):
            return None
        rank = pulse.rank
        what = f"the engine{self._which(name)} has not moved for {pulse.still_s:.0f} s, with {rank.running:.0f} requests running and {rank.waiting:.0f} waiting"
        if len(self.pulses) > 1:
            alive = sum(other.still_s == 0 and other.absent_since is None for other in self.pulses.values())
            what += f" ({alive} of {len(self.pulses)} ranks are well)"
        if not pulse.moved:
            hint = "a first request that compiles for longer needs watch.first_request_timeout_s"
            return Finding("hang", "engine_hung", what + "; it had not moved since its start", hint, pulse.still_s)
        return Finding("hang", "engine_hung", what, "a step that rightly takes longer needs watch.hang_timeout_s", pulse.still_s)

    def _which(self, name: str) -> str:
        return f"'s rank {name}" if len(self.pulses) > 1 else ""

    # -- silence

    def _silent(self, sample: Sample) -> Finding | None:
        for pulse in self.pulses.values():
            if pulse.canary is not None:
                pulse.canary.blind = True
            pulse.contiguous = False  # nobody knows whether it moved: its server's figures may be as old as its silence
        if self._silence is None:
            self._silence = Silence(sample.asked_at, sample.asked_at, sample.front_cpu_s, sample.at)
            return None
        silence = self._silence
        silence.take(sample)
        quiet, silent = sample.at - silence.quiet_since, sample.at - silence.since
        if not self.limits.hang_s or (quiet < self.limits.hang_s and silent < self.limits.silent_s):
            return None
        self._silence = None
        state = "is stopped (state T)" if sample.stopped else "uses no CPU" if quiet >= self.limits.hang_s else "computes all the while"
        what = f"the engine's server has answered nothing for {silent:.0f} s and {state}"
        hint = "kill -CONT, if somebody stopped it; vllmctl pause keeps it from being judged" if sample.stopped else "its own lines in the journal, and its stacks, say where it hangs"
        return Finding("hang", "engine_hung", what, hint)

    # -- proofs of life

    def _readable(self, name: str) -> bool:
        return self.outcome == "ok" or (self.outcome == "absent" and name == ALONE)

    def due(self, at: float) -> list[str]:
        """The ranks to ask for a proof of life now: idle, and without one for the interval."""
        if not self.limits.canary_interval_s:
            return []
        return [
            name
            for name, pulse in self.pulses.items()
            if self._readable(name)
            and pulse.canary is None
            and pulse.settled
            and not pulse.rank.has_work
            and at >= pulse.next_canary_at
            and at >= pulse.proof_at + (self.limits.canary_interval_s if not pulse.failed else 0)
        ]

    def asked(self, name: str, at: float) -> Canary:
        canary = self.pulses[name].canary = Canary(at)
        return canary

    def replied(self, name: str, canary: Canary, reply: Reply, at: float, *, detail: str = "", computing: bool = False) -> Finding | None:
        """What came of it. `computing`: the engine used the CPU meanwhile, which is all that is known of one without a heartbeat."""
        pulse = self.pulses.get(name)
        if pulse is None or pulse.canary is not canary:  # the clocks began anew meanwhile
            return None
        if reply == "timeout" and name != ALONE:
            canary.expired_at = at  # the next reading decides
            return None
        pulse.canary = None
        if reply in ("ok", "refused") or (reply == "timeout" and computing):
            pulse.prove(at)
        else:
            pulse.next_canary_at = at + RETRY_S
        if reply == "failed":
            return self._failed(name, pulse, at, "engine_unhealthy", detail)
        if reply == "timeout" and not computing:
            return self._failed(name, pulse, at, "engine_hung", f"no answer within {at - canary.asked_at:.0f} s")
        return None

    def _failed(self, name: str, pulse: Pulse, at: float, code: Literal["engine_hung", "engine_unhealthy"], detail: str) -> Finding | None:
        pulse.failed += 1
        if pulse.failed < self.limits.failures:
            return None
        what = f"{pulse.failed} proofs of life in a row failed on the idle engine{self._which(name)}: {detail}"
        pulse.rebase(at)
        return Finding("canary", code, what, "ask it by hand; its own lines in the journal say why")

    def _expired(self, name: str, pulse: Pulse, sample: Sample) -> Finding | None:
        canary = pulse.canary
        if canary is None or canary.expired_at is None or sample.asked_at < canary.expired_at:
            return None
        if canary.blind and pulse.blinded + 1 < BLIND:
            pulse.canary, pulse.blinded, pulse.next_canary_at = None, pulse.blinded + 1, sample.at + RETRY_S
            return None
        if canary.moved and canary.worked:  # busy after all: requests came in meanwhile
            pulse.canary = None
            pulse.prove(sample.at)
            return None
        waited = canary.expired_at - canary.asked_at
        idle = sample.at - pulse.proof_at
        what = f"the idle engine{self._which(name)} did not answer a proof of life within {waited:.0f} s, and has not moved; its last sign of life is {idle:.0f} s old"
        return Finding("canary", "engine_hung", what, "a proof of life that rightly takes longer needs watch.canary_timeout_s")
