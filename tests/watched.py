"""An engine that is watched, reading by reading: for tests of core/liveness."""

from __future__ import annotations

from vllmd.core.liveness import Finding, Limits, Liveness
from vllmd.core.pulse import Outcome, Rank, Sample

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


def idle(watched: Watched, seconds: float = 301) -> None:
    watched.read(seconds, r0=IDLE)
