"""How long to go on asking sources that cannot be reached, and how often."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from vllmd.models.amounts import duration
from vllmd.models.progress import Progress

LONGEST_PAUSE_S = 300.0
SAY_AGAIN_S = 10.0
PROGRESS_BYTES = 1 << 20
"""Less is no sign of life: a server that trickles a byte a second would be asked for ever."""


class Patience:
    """`first_pause_s` doubles with each wait; both clocks begin anew with each MiB of a model that arrives."""

    def __init__(self, first_pause_s: float, timeout_s: float) -> None:
        self._first_s = first_pause_s
        self._timeout_s = timeout_s
        self._most_bytes = -1
        self._begin()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._pause_s = self._first_s

    def saw(self, progress: Progress) -> None:
        if progress.phase != "fetch" or not progress.total_bytes:
            return
        if self._most_bytes < 0:  # the first count is what an earlier attempt left
            self._most_bytes = progress.done_bytes
        elif progress.done_bytes - self._most_bytes >= PROGRESS_BYTES:
            self._most_bytes = progress.done_bytes
            self._begin()

    def is_over(self) -> bool:
        return time.monotonic() - self._since >= self._timeout_s

    def wait(self, reason: str, report: Callable[[Progress], None]) -> None:
        """Sleeps for the next pause, or up to the end of the time allowed, and says so every 10 s."""
        left_s = self._since + self._timeout_s - time.monotonic()
        until = time.monotonic() + max(min(self._pause_s * random.uniform(0.8, 1.2), left_s), 0.01)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        level = "warning"
        while (rest := until - time.monotonic()) > 0:
            text = f"asking again in {duration(rest)} (giving up in {duration(max(left_s, 0))}): {reason}"
            report(Progress("resolve", text=text, level=level))
            level = ""
            time.sleep(min(rest, SAY_AGAIN_S))
