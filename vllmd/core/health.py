"""Does a ready engine refuse? Only explicit refusals count, in a row; a slow or lost answer never ends an instance.

Probes that took a timeout for death restarted busy, healthy servers several times a day (ray #54070, gpustack #3189).
Whether an engine that answers is hung is decided elsewhere, from its heartbeat.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Refusals:
    """How often in a row the engine refused, and how: '503' or 'refused' (nobody listens)."""

    limit: int
    count: int = 0
    kind: str = ""

    def after(self, outcome: str, status: int, *, listening: bool) -> Refusals:
        """`outcome` as system/http's Answer; `listening` says whether a socket of ours still listens there.

        A refused connection while our listener stands is a full backlog: busy, not dead.
        """
        if outcome == "answered" and status == 503:
            return replace(self, count=self.count + 1, kind="503")
        if outcome == "refused" and not listening:
            return replace(self, count=self.count + 1, kind="refused")
        return replace(self, count=0, kind="")

    @property
    def reached(self) -> bool:
        return self.count >= self.limit
