"""A sign of life during work that says nothing of itself: fsync of a large model takes minutes on a slow disk, and whoever
waits for this process would take it for hung."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL_S = 5.0
LONGEST_S = 1800.0
"""Silence after that is for others to judge: the storage does not answer."""


@contextmanager
def beating(beat: Callable[[], None], interval_s: float = INTERVAL_S, longest_s: float = LONGEST_S) -> Iterator[None]:
    """Calls `beat` every `interval_s`, from a thread, until the block ends, but no longer than `longest_s`."""
    over = threading.Event()

    def run() -> None:
        for _ in range(int(longest_s / interval_s)):
            if over.wait(interval_s):
                return
            beat()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
