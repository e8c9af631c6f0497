"""How fast it goes, and how long it will take."""

from __future__ import annotations

import threading
import time
from collections import deque

from vllmd.models.progress import Progress

WINDOW_S = 5.0


class Meter:
    """`moved` from any thread; `look` from one."""

    def __init__(self, done_bytes: int, total_bytes: int) -> None:
        self._lock = threading.Lock()
        self._done, self._total = done_bytes, total_bytes
        self._came = 0
        self._past: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def moved(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._came += count

    def lost(self, count: int) -> None:
        """Bytes that counted are to be fetched again."""
        with self._lock:
            self._done -= count

    def look(self) -> Progress:
        now = time.monotonic()
        with self._lock:
            done, came = self._done, self._came
        while len(self._past) > 1 and now - self._past[0][0] > WINDOW_S:
            self._past.popleft()
        since, before = self._past[0]
        self._past.append((now, came))
        rate = int((came - before) / max(now - since, 0.001))
        eta = -1 if rate <= 0 else (self._total - done) // rate
        return Progress("fetch", done_bytes=done, total_bytes=self._total, bytes_per_s=rate, eta_s=int(eta))
