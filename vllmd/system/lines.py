"""The engine's output, line by line, whatever it writes: floods, progress bars, no line break at all, broken UTF-8.

The pipe is always read, so that a flooding engine never blocks on us; what is more than the wanted rate is counted and
thrown away unread, and each turn is short, so that the flood never blocks the loop.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

_SEPARATOR = re.compile(rb"[\r\n]+")
_CHUNK = 1 << 16
_TURN_LINES = 64
"""Lines handed on per turn: what on_line does with each (the journal, a few regular expressions) is most of the work."""
_TURN_CHUNKS = 4
_REPORT_S = 1.0
_SETTLE_S = 0.25
"""A progress bar ends its text by the \\r of the *next* one: after this long it counts as a line."""
_LAST_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class LineLimits:
    """`line_max_bytes`: a longer line is cut. `lines_per_s`: the rest is counted; a burst of one second's worth is let by."""

    line_max_bytes: int = 16384
    lines_per_s: int = 1000


class TokenBucket:
    """`rate` per second, saved up for one second. May be shared by the readers of one engine."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._tokens = rate
        self._filled_at = clock()

    def take(self, wanted: int) -> int:
        """How many of the wanted ones are granted."""
        now = self._clock()
        self._tokens = min(self.rate, self._tokens + (now - self._filled_at) * self.rate)
        self._filled_at = now
        granted = min(wanted, int(self._tokens))
        self._tokens -= granted
        return granted

    def give_back(self, unused: int) -> None:
        self._tokens += unused


def _nothing(*_: object) -> None:
    pass


class LineReader:
    """Owns the descriptor from now on. `on_line` gets text without its line break, never empty; `on_dropped` gets how many
    lines were dropped since it was last called, about once a second; `on_close` is called once, when every writer is gone
    or after close()."""

    def __init__(
        self,
        fd: int,
        on_line: Callable[[str], None],
        *,
        limits: LineLimits = LineLimits(),
        bucket: TokenBucket | None = None,
        on_dropped: Callable[[int], None] = _nothing,
        on_close: Callable[[], None] = _nothing,
    ) -> None:
        self._fd = fd
        self._on_line = on_line
        self._on_dropped = on_dropped
        self._on_close = on_close
        self._line_max = limits.line_max_bytes
        self._bucket = bucket or TokenBucket(limits.lines_per_s)
        self._partial = bytearray()
        self._cut = 0
        self._rest = b""
        self._unsettled = False
        self._unreported = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._turn_wanted: asyncio.Handle | None = None
        self.dropped = 0
        """Lines dropped since the start."""
        self.closed = False
        os.set_blocking(fd, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._readable)

    def limit(self, limits: LineLimits) -> None:
        """Other limits from now on, also for those who share the bucket."""
        self._line_max = limits.line_max_bytes
        self._bucket.rate = limits.lines_per_s

    def close(self) -> None:
        """Take what is in the pipe already (a bounded amount), hand on an unfinished line, and let go. Idempotent."""
        if self.closed:
            return
        end = time.monotonic() + 0.1
        while self._rest and time.monotonic() < end:
            self._consume(b"")
        taken = 0
        while taken < _LAST_READ_BYTES and time.monotonic() < end and (chunk := self._read()):
            taken += len(chunk)
            self._consume(chunk)
            while self._rest and time.monotonic() < end:
                self._consume(b"")
        self._end()

    # --- reading

    def _readable(self) -> None:
        if self._turn_wanted is None:
            self._turn()

    def _continue(self) -> None:
        self._turn_wanted = None
        self._turn()

    def _turn(self) -> None:
        for _ in range(_TURN_CHUNKS):
            if self.closed or self._rest:
                break
            chunk = self._read()
            if chunk is None:
                return
            if not chunk:
                self._end()
                return
            self._consume(chunk)
        else:
            return
        if not self.closed:
            self._consume(b"")
            if self._rest:
                self._turn_wanted = self._loop.call_soon(self._continue)

    def _read(self) -> bytes | None:
        """None when there is nothing now, b'' at the end."""
        try:
            return os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _end(self) -> None:
        self._finish_line()
        self._report()
        self.closed = True
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        for timer in self._timers.values():
            timer.cancel()
        if self._turn_wanted is not None:
            self._turn_wanted.cancel()
        self._on_close()

    # --- splitting

    def _consume(self, chunk: bytes) -> None:
        """Hand on some lines of what waits and of this chunk; the rest waits for the next turn, or is dropped."""
        data = self._rest + chunk
        self._rest = b""
        granted = self._bucket.take(_TURN_LINES)
        pieces = _SEPARATOR.split(data, maxsplit=granted) if granted else [data]
        for piece in pieces[:-1]:
            self._extend(piece)
            self._finish_line()
        tail = pieces[-1]
        spared = granted - (len(pieces) - 1)
        self._bucket.give_back(spared)
        if spared:  # fewer lines than allowed: the tail has no separator
            self._extend(tail)
            self._settle_later(data)
        elif granted == _TURN_LINES:
            self._rest = tail
        else:
            self._discard(tail)

    def _extend(self, piece: bytes) -> None:
        room = self._line_max - len(self._partial)
        self._partial += piece[:room]
        self._cut += max(0, len(piece) - room)

    def _finish_line(self) -> None:
        if self._partial:
            text = self._partial.decode(errors="replace")
            self._on_line(f"{text} [{self._cut} bytes cut]" if self._cut else text)
        self._forget_line()

    def _forget_line(self) -> None:
        self._partial.clear()
        self._cut = 0

    # --- dropping

    def _discard(self, data: bytes) -> None:
        """The rate is used up: count the lines, without looking at them, and keep the unfinished one."""
        last = max(data.rfind(b"\n"), data.rfind(b"\r"))
        if last < 0:
            self._extend(data)
            return
        self._count(data.count(b"\n", 0, last + 1) or data.count(b"\r", 0, last + 1))
        self._forget_line()
        self._extend(data[last + 1 :])

    def _count(self, lines: int) -> None:
        self.dropped += lines
        self._unreported += lines
        if "report" not in self._timers:
            self._timers["report"] = self._loop.call_later(_REPORT_S, self._report)

    def _report(self) -> None:
        self._timers.pop("report", None)
        if self._unreported:
            self._on_dropped(self._unreported)
            self._unreported = 0

    # --- progress bars

    def _settle_later(self, data: bytes) -> None:
        """After a \\r an unfinished line is a progress bar's current text, which may be all that comes for minutes."""
        if b"\r" in data or b"\n" in data:
            self._unsettled = data.rfind(b"\r") > data.rfind(b"\n")
        if self._partial and self._unsettled and "settle" not in self._timers:
            self._timers["settle"] = self._loop.call_later(_SETTLE_S, self._settle)

    def _settle(self) -> None:
        self._timers.pop("settle", None)
        if self._unsettled and not self.closed:
            self._finish_line()
