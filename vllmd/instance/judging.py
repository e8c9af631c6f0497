"""What a detector's verdict comes to: it ends the instance, or it is only counted and journalled (watch.observe, a pause)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from vllmd.config.settings import Watch
from vllmd.core import events as ev
from vllmd.errors import VllmdError
from vllmd.instance import record
from vllmd.instance.vitals import Vitals
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr

SILENT_S = 60.0
"""What ends nothing is found again and again: every time is counted, and one a minute told."""
Came = Literal["acted", "observed", "paused"]


class Judge:
    """`settings` is asked each time, so that a reload applies. Detectors: config/detectors.py."""

    def __init__(self, journal: Journal | Stderr, vitals: Vitals, post: Callable[[ev.Event], None], settings: Callable[[], Watch]) -> None:
        self._journal = journal
        self._vitals = vitals
        self._post = post
        self._settings = settings
        self._told: dict[tuple[str, str], float] = {}

    def reach(self, detector: str, error: VllmdError, *, event: str, priority: int = 3) -> Came:
        """`event` is the kind of the journal's entry where the verdict acts."""
        came: Came = "paused" if self._vitals.paused else "observed" if detector in self._settings().observe else "acted"
        self._vitals.verdicts[detector, came] += 1
        if came == "acted":
            self._journal.event(event, error.what, priority=priority, hint=error.hint, detector=detector, code=error.code)
            self._post(ev.VerdictReached(record.failure_of(error)))
            return came
        now = time.monotonic()
        if now - self._told.get((detector, error.code), -SILENT_S) < SILENT_S:
            return came
        self._told[detector, error.code] = now
        why = "the instance is paused" if came == "paused" else f"{detector} only observes"
        what = f"would end the instance ({why}): {error.what}"
        self._journal.event("would-act", what, priority=4, hint=error.hint, detector=detector, code=error.code)
        return came
