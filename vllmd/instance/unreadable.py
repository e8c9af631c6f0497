"""Says once that the heartbeat cannot be read while the engine is well otherwise: a hang of it would go unnoticed."""

from __future__ import annotations

from vllmd.core.pulse import Outcome
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr

READINGS = 3
_TEXT = {
    "absent": "the engine shows no heartbeat in its metrics (--disable-log-stats?)",
    "error": "the engine answers its metrics with an error",
    "invalid": "the engine's metrics are not what vllmd can read, or too long",
    "timeout": "the engine's metrics do not come in time",
    "reset": "the engine breaks off its metrics",
}


class Unreadable:
    """`beating`: the engine is one that has a heartbeat at all."""

    def __init__(self, journal: Journal | Stderr, *, beating: bool) -> None:
        self._journal = journal
        self._beating = beating
        self._count = 0
        self._told = ""

    def heard(self, outcome: Outcome) -> None:
        if outcome not in _TEXT:
            if outcome == "ok" and self._told:
                self._journal.event("heartbeat-unreadable", "the heartbeat can be read again", priority=6)
            self._count, self._told = 0, ""
            return
        self._count += 1
        self._last = outcome

    def healthy(self) -> None:
        """/health has answered."""
        if self._beating and self._count >= READINGS and self._told != self._last:
            self._told = self._last
            self._journal.event("heartbeat-unreadable", _TEXT[self._last], priority=4)
