"""Is a start getting anywhere? Two kinds of progress, two clocks; times are given, in monotonic seconds.

Strong progress (a new phase, a percentage or a byte count that grows) resets the stall clock. Weak progress (CPU, log
lines) stretches it, to at most three times its length: an engine that compiles for ten minutes says nothing but burns
CPU, and one that spins for ever does the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

WEAK_STRETCH = 3.0


@dataclass(frozen=True, slots=True)
class StartClock:
    """When a start began and when it last moved. `seen` are the phases that were reached; `fraction` the highest so far
    in the present phase."""

    stall_s: float
    start_s: float
    began: float
    strong_at: float
    weak_at: float
    phase: str = ""
    seen: frozenset[str] = frozenset()
    fraction: float = -1.0

    @classmethod
    def begin(cls, now: float, *, stall_s: float, start_s: float) -> StartClock:
        return cls(stall_s=stall_s, start_s=start_s, began=now, strong_at=now, weak_at=now)

    def strong(self, now: float) -> StartClock:
        return replace(self, strong_at=now, weak_at=now)

    def weak(self, now: float) -> StartClock:
        return replace(self, weak_at=now)

    def line(self, now: float, phase: str, fraction: float | None) -> StartClock:
        """A log line was read. A phase that was seen before, or a percentage that does not grow, is weak."""
        if phase and phase not in self.seen:
            fresh = replace(self, phase=phase, seen=self.seen | {phase}, fraction=-1.0 if fraction is None else fraction)
            return fresh.strong(now)
        if fraction is not None and fraction > self.fraction:
            return replace(self, fraction=fraction).strong(now)
        return self.weak(now)

    @property
    def stalls_at(self) -> float:
        return min(max(self.strong_at, self.weak_at) + self.stall_s, self.strong_at + WEAK_STRETCH * self.stall_s)

    @property
    def expires_at(self) -> float:
        return self.began + self.start_s

    @property
    def deadline(self) -> float:
        return min(self.stalls_at, self.expires_at)

    def verdict(self, now: float) -> str:
        """'' while it may go on, 'stalled', or 'expired'."""
        if now >= self.expires_at:
            return "expired"
        return "stalled" if now >= self.stalls_at else ""
