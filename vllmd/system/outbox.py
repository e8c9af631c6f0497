"""A bounded queue in front of a log that may not take what we write: the engine's lines go before our own events.

Order is kept over both kinds. When it is full the oldest line of the engine is dropped (its last words matter most when
it crashes), and an event of our own only when no line is left.
"""

from __future__ import annotations

from collections import deque


class Outbox:
    """`dropped_lines` and `dropped_events` count what was dropped and not reported yet (`take_dropped`)."""

    def __init__(self, limit_bytes: int = 4 << 20, limit_entries: int = 8192) -> None:
        self._limit_bytes = limit_bytes
        self._limit_entries = limit_entries
        self._lines: deque[tuple[int, bytes]] = deque()
        self._events: deque[tuple[int, bytes]] = deque()
        self._number = 0
        self._bytes = 0
        self.dropped_lines = 0
        self.dropped_events = 0
        self.dropped_total = 0

    def __len__(self) -> int:
        return len(self._lines) + len(self._events)

    def put_event(self, entry: bytes) -> None:
        self._put(self._events, entry)

    def put_line(self, entry: bytes) -> None:
        self._put(self._lines, entry)

    def head(self) -> bytes:
        """The oldest entry; IndexError when empty."""
        return self._oldest()[0][1]

    def pop(self) -> bytes:
        entry = self._oldest().popleft()[1]
        self._bytes -= len(entry)
        return entry

    def replace_head(self, entry: bytes) -> None:
        """What is left of the oldest entry after a part of it was written."""
        queue = self._oldest()
        number, whole = queue.popleft()
        queue.appendleft((number, entry))
        self._bytes += len(entry) - len(whole)

    @property
    def has_dropped(self) -> bool:
        return bool(self.dropped_lines or self.dropped_events)

    def take_dropped(self) -> tuple[int, int]:
        """(lines, events) dropped since the last call."""
        dropped = self.dropped_lines, self.dropped_events
        self.dropped_lines = self.dropped_events = 0
        return dropped

    def drop_head(self) -> None:
        """Drop what can never be sent."""
        own = self._oldest() is self._events
        self.pop()
        self._count(own=own)

    def _oldest(self) -> deque[tuple[int, bytes]]:
        if not self._events:
            return self._lines
        if not self._lines or self._events[0][0] < self._lines[0][0]:
            return self._events
        return self._lines

    def _put(self, queue: deque[tuple[int, bytes]], entry: bytes) -> None:
        self._number += 1
        queue.append((self._number, entry))
        self._bytes += len(entry)
        while len(self) > 1 and (self._bytes > self._limit_bytes or len(self) > self._limit_entries):
            self._drop_one()

    def _drop_one(self) -> None:
        victim = self._lines or self._events
        self._bytes -= len(victim.popleft()[1])
        self._count(own=victim is self._events)

    def _count(self, *, own: bool) -> None:
        self.dropped_total += 1
        if own:
            self.dropped_events += 1
        else:
            self.dropped_lines += 1
