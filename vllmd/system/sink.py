"""What the journal and the terminal have in common: entries go out as far as they are taken, the rest waits, nobody blocks."""

from __future__ import annotations

import asyncio
import contextlib
import select
import time
from collections.abc import Callable, Mapping
from typing import Literal, Self

from vllmd.system.outbox import Outbox

Outcome = Literal["sent", "blocked", "gone", "impossible"]
WARNING, NOTICE, INFO = 4, 5, 6
LEVELS = {"error": 3, "warning": WARNING, "info": INFO, "debug": 7}
"""The words of the configuration."""
RETRY_S = 1.0
"""How often a vanished reader is looked for again."""
REPORT_S = 1.0
"""Drops are reported at most this often."""


def _unheard(_event_id: str, _message: str, _priority: int) -> None:
    """Nobody wants to know."""


class Sink:
    """`fields` stand on every entry. Works before attach() too: then what is not taken waits for the next entry.

    Fields are given by name: a lower-case name becomes VLLMD_<NAME> in the journal, an upper-case one is the journal's own.
    """

    def __init__(self, fields: Mapping[str, object], outbox: Outbox | None = None) -> None:
        self.level = INFO
        """Own events of a higher (less important) priority are not sent."""
        self.redact: Callable[[str], str] = str
        """What every event of our own goes through; the engine's lines come redacted."""
        self.told: Callable[[str, str, int], object] = _unheard
        """Hears (event_id, message, priority) of every event of a kind that is sent, redacted."""
        self._fields = dict(fields)
        self._outbox = Outbox() if outbox is None else outbox
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer_fd = -1
        self._retry: asyncio.TimerHandle | None = None
        self._reported_at = 0.0

    @property
    def dropped(self) -> int:
        """Entries dropped since the start."""
        return self._outbox.dropped_total

    @property
    def waiting(self) -> int:
        """Entries that nobody has taken yet."""
        return len(self._outbox)

    def attach(self, loop: asyncio.AbstractEventLoop) -> Self:
        self._loop = loop
        self._flush()
        return self

    def bind(self, **fields: object) -> None:
        """Fields that stand on every entry from now on; an empty value takes one away."""
        self._fields.update(fields)

    def event(self, event_id: str, message: str, *, priority: int = INFO, **fields: object) -> None:
        """One of our own events. `event_id` is a row of messages.MESSAGES, or '' for a message of no kind."""
        if priority <= self.level:
            told = {name: self.redact(value) if isinstance(value, str) else value for name, value in fields.items()}
            text = self.redact(message)
            self._outbox.put_event(self._encode_event(event_id, text, priority, told))
            self._flush()
            if event_id:
                self.told(event_id, text, priority)

    def engine_line(self, text: str, priority: int = INFO, **fields: object) -> None:
        """One line of the engine's output."""
        self._outbox.put_line(self._encode_line(text, priority, fields))
        self._flush()

    def flush(self, timeout_s: float) -> bool:
        """Wait (blocking: for the end of the process only) until everything is sent; False when time ran out."""
        deadline = time.monotonic() + timeout_s
        self._flush()
        while self._outbox and (rest := deadline - time.monotonic()) > 0:
            if (descriptor := self._descriptor_now()) < 0:
                time.sleep(min(rest, 0.02))
            else:
                poll = select.poll()
                poll.register(descriptor, select.POLLOUT)
                poll.poll(rest * 1000)
            self._flush()
        return not self._outbox

    def close(self, timeout_s: float = 0.5) -> None:
        """Send what can be sent within the time, and let go of everything, the loop too. What comes later (the reason of
        the end, told after the loop is gone) opens it again. Idempotent."""
        self.flush(timeout_s)
        self._stop_waiting()
        self._release()
        self._loop = None

    # --- what differs

    def _encode_event(self, event_id: str, message: str, priority: int, fields: Mapping[str, object]) -> bytes:
        raise NotImplementedError

    def _encode_line(self, text: str, priority: int, fields: Mapping[str, object]) -> bytes:
        raise NotImplementedError

    def _transmit(self, entry: bytes) -> Outcome:
        """Send one entry; never raises, never blocks."""
        raise NotImplementedError

    def _descriptor_now(self) -> int:
        """What to wait for after 'blocked'; -1 for nothing."""
        raise NotImplementedError

    def _release(self) -> None:
        raise NotImplementedError

    # --- what does not

    def _flush(self) -> None:
        while self._outbox:
            outcome = self._transmit(self._outbox.head())
            if outcome == "blocked":
                return self._wait_writable()
            if outcome == "gone":
                return self._wait_retry()
            if outcome == "impossible":
                # Not reported now: where nothing can be written (a full disk, a terminal that hung up), the report would
                # be dropped as well, and be reported, for ever.
                self._outbox.drop_head()
            else:
                self._outbox.pop()
                self._report_dropped()
        return self._stop_waiting()

    def _report_dropped(self) -> None:
        now = time.monotonic()
        if not self._outbox.has_dropped or (self._outbox and now - self._reported_at < REPORT_S):
            return
        self._reported_at = now
        lines, events = self._outbox.take_dropped()
        text = f"The log was not taken for a while: {lines} lines of the engine and {events} events of vllmd are lost."
        counts: dict[str, object] = {"dropped_lines": lines, "dropped_events": events}
        self._outbox.put_event(self._encode_event("lines-dropped", text, WARNING, counts))

    def _usable_loop(self) -> asyncio.AbstractEventLoop | None:
        return None if self._loop is None or self._loop.is_closed() else self._loop

    def _wait_writable(self) -> None:
        descriptor = self._descriptor_now()
        if (loop := self._usable_loop()) is not None and descriptor >= 0 and self._writer_fd < 0:
            with contextlib.suppress(OSError):  # a regular file cannot be waited for, and never blocks
                loop.add_writer(descriptor, self._flush)
                self._writer_fd = descriptor

    def _wait_retry(self) -> None:
        self._forget_writer()
        if (loop := self._usable_loop()) is not None and self._retry is None:
            self._retry = loop.call_later(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self._flush()

    def _forget_writer(self) -> None:
        if self._writer_fd >= 0 and (loop := self._usable_loop()) is not None:
            loop.remove_writer(self._writer_fd)
        self._writer_fd = -1

    def _stop_waiting(self) -> None:
        self._forget_writer()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
