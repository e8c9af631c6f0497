"""The log of a fetch, beside its stage: STORE/.staging/<label>.log. Kept when the fetch failed, or always (VLLM_KEEP_LOGS)."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from pathlib import Path

LIMIT_BYTES = 4 << 20
"""A server that fails for hours must not fill the disk with lines about it."""


class FetchLog:
    """Appends lines, from any thread. It never fails: a fetch is not ended for want of its log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o644)
            self._left = LIMIT_BYTES - os.fstat(self._fd).st_size
        except OSError:
            self._fd, self._left = -1, 0

    def line(self, text: str) -> None:
        shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
        data = f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {shown}\n".encode("utf-8", "backslashreplace")
        with self._lock:
            if self._fd < 0 or len(data) > self._left:
                return
            self._left -= len(data)
            try:
                os.write(self._fd, data)
            except OSError:
                self._left = 0

    def close(self, *, keep: bool) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if not keep:
            try:
                self.path.unlink(missing_ok=True)
            except OSError:
                return
