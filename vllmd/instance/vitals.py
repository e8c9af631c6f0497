"""What is known of a running engine from one moment to the next: written by those who watch, read by the metrics and the board.

Plain and mutable: one loop owns it, and whoever reads it does so between two turns of that loop.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Vitals:
    """`last_scrape`: ok, absent (an engine without a heartbeat), refused, timeout, reset, invalid, 503, error, sleeping;
    '' before the first. `verdicts` counts by (detector, what came of it: 'acted', 'observed' or 'paused')."""

    heartbeat_at: float | None = None
    """When the heartbeat of the rank that has stood still longest was last seen moving, or it last had nothing to do (monotonic)."""
    running: float = 0.0
    waiting: float = 0.0
    last_scrape: str = ""
    canaries: Counter[str] = field(default_factory=Counter)
    """Proofs of life sent to the idle engine, by what came back: ok, late, timeout, failed, refused, void."""
    canary_s: float | None = None
    """How long the last good one took."""
    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    deaths: int = 0
    """Processes of the engine that ended while it was ready, helpers included."""
    exposition: bytes = b""
    """The engine's last metrics, as they came."""
    paused: dict[str, Any] | None = None
    gpus: dict[str, Any] | None = None
    """The latest snapshot of the GPU watch."""

    @property
    def heartbeat_age_s(self) -> float | None:
        """Seconds of stillness with work to do; None while nothing is known."""
        return self.heartbeat_age_at(time.monotonic())

    def heartbeat_age_at(self, at: float) -> float | None:
        return None if self.heartbeat_at is None else max(0.0, at - self.heartbeat_at)
