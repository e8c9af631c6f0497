"""EXTEND_TIMEOUT_USEC: systemd's timeout follows our own clocks, so that TimeoutStartSec and TimeoutStopSec can be short."""

from __future__ import annotations

import time

from vllmd.system.notify import Notifier, NullNotifier

MARGIN_S = 15.0
"""Past our own deadline systemd waits this much longer: the verdict, the kill and its record are ours to make."""
STEP_S = 5.0


class Clockwork:
    """`allow(seconds)` says how long the present work may still take; `tell` passes it on while it changes."""

    def __init__(self, notifier: Notifier | NullNotifier) -> None:
        self._notifier = notifier
        self._until = 0.0
        self._at_least = 0.0
        self._told_at = 0.0

    def at_least(self, seconds: float) -> None:
        """Whatever the work allows itself: a person works on it for so long."""
        self._at_least = time.monotonic() + seconds
        self._told_at = 0.0
        self.tell()

    def allow(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._told_at = 0.0
        self.tell()

    def rest(self) -> None:
        """Nothing is bounded now (ready)."""
        self._until = 0.0

    def tell(self) -> None:
        now = time.monotonic()
        until = max(self._until, self._at_least) if self._until else 0.0
        if until > now and now - self._told_at >= STEP_S:
            self._told_at = now
            self._notifier.extend(until - now + MARGIN_S)
