"""What is seen of a running engine: a reading of its figures, one rank of it over time, and how long its server is silent.

The parts that core/liveness judges. Time during which nothing could be read counts for nobody. Nothing here has a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["ok", "absent", "sleeping", "503", "error", "invalid", "refused", "timeout", "reset"]
"""Of one reading. `absent`: answered, and this engine shows no heartbeat. `error`: another status than 200 and 503."""
SILENT: frozenset[Outcome] = frozenset({"timeout", "reset"})
BUSY_CORES = 0.2
"""A server that computes less than this share of a core while it answers nobody does not compute."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What one data-parallel rank shows, added up over API servers. `beats` is the count of its iterations; `others` any
    further figures that only move when it works: a prompt in chunks has iterations without output, which vLLM counts
    nowhere, but the share of the KV cache in use grows with each. `succeeded`: requests that ended well. `generated`,
    `prompted` (tokens so far) and `kv_used` (0 to 1) are for people: None where an engine does not say; nothing is judged by them."""

    beats: float
    running: float = 0.0
    waiting: float = 0.0
    succeeded: float = 0.0
    others: tuple[float, ...] = ()
    generated: float | None = None
    prompted: float | None = None
    kv_used: float | None = None

    @property
    def has_work(self) -> bool:
        return self.running + self.waiting > 0

    @property
    def figures(self) -> tuple[float, ...]:
        return (self.beats, self.running, self.waiting, self.succeeded, *self.others)


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading: asked when, over when. `front_cpu_s` is the CPU time of the processes that answer, so far; `stopped`:
    the kernel says that they are (state T); `runnable`: that one of them wants a processor (state R). Looked at only where nobody answered."""

    asked_at: float
    at: float
    outcome: Outcome
    ranks: Mapping[str, Rank] = field(default_factory=dict)
    front_cpu_s: float = 0.0
    stopped: bool = False
    runnable: bool = False


@dataclass(slots=True)
class Canary:
    """A proof of life on its way, or one that was not answered in time (`expired_at`) and waits for the next reading."""

    asked_at: float
    moved: bool = False
    worked: bool = False
    blind: bool = False
    """The server answered nobody for a while meanwhile: it may never have seen the request."""
    expired_at: float | None = None


@dataclass(slots=True)
class Pulse:
    """One rank over time. `still_s`: how long it was seen standing still with work to do; `proof_at`: when real requests, or a
    proof of life, last showed that it computes."""

    rank: Rank
    at: float
    proof_at: float
    still_s: float = 0.0
    contiguous: bool = True
    settled: bool = True
    """The last reading followed another good one: the first after a silence may be as old as that."""
    moved: bool = False
    canary: Canary | None = None
    next_canary_at: float = 0.0
    failed: int = 0
    blinded: int = 0
    """Proofs of life in a row that were not answered, and may never have been seen."""
    absent_since: float | None = None
    """Since which reading the engine has shown other ranks, and not this one."""

    def take(self, rank: Rank, at: float) -> None:
        old, self.rank = self.rank, rank
        if rank.beats < old.beats or rank.succeeded < old.succeeded:  # a counter that began anew says nothing about before
            self.still_s, self.proof_at, self.canary = 0.0, at, None
        elif rank.figures != old.figures:
            self._move(old, rank, at)
        elif rank.has_work and self.contiguous:
            self.still_s += at - self.at
        elif not rank.has_work:
            self.still_s = 0.0
        self.at, self.settled, self.contiguous, self.absent_since = at, self.contiguous, True, None
        if self.canary is not None:
            self.canary.worked |= rank.has_work or rank.succeeded > old.succeeded

    def _move(self, old: Rank, rank: Rank, at: float) -> None:
        self.still_s = 0.0
        if self.canary is not None:
            self.canary.moved = True
        # Figures that move without any request prove nothing.
        if rank.succeeded > old.succeeded or (rank.has_work or old.has_work):
            self.prove(at)
            self.moved |= rank.beats > old.beats

    def miss(self, at: float) -> float:
        """A reading without it: nobody knows whether it moved. Returns for how long there have been only such."""
        self.contiguous = self.settled = False
        if self.canary is not None:
            self.canary.blind = True
        self.absent_since = at if self.absent_since is None else self.absent_since
        return at - self.absent_since

    def skip(self, seconds: float) -> None:
        """We stood still for so long, and saw nothing."""
        self.contiguous, self.canary = False, None
        self.proof_at += seconds
        self.absent_since = None if self.absent_since is None else self.absent_since + seconds

    def prove(self, at: float) -> None:
        """It computes."""
        self.proof_at, self.failed, self.blinded = at, 0, 0

    def rebase(self, at: float) -> None:
        self.still_s, self.contiguous, self.canary = 0.0, False, None
        self.prove(at)


@dataclass(slots=True)
class Silence:
    """Since when nobody answered; `quiet_since`: since when they did not compute either."""

    since: float
    quiet_since: float
    cpu_s: float
    at: float

    def skip(self, seconds: float) -> None:
        self.since, self.quiet_since, self.at = self.since + seconds, self.quiet_since + seconds, self.at + seconds

    def take(self, sample: Sample) -> None:
        span = sample.at - self.at
        computed = span > 0 and (sample.front_cpu_s - self.cpu_s) / span >= BUSY_CORES
        # One that would compute if it got a processor waits for the machine: a host with more work than cores.
        if not sample.stopped and (computed or sample.runnable):
            self.quiet_since = sample.at
        self.cpu_s, self.at = sample.front_cpu_s, sample.at
