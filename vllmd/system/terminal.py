"""The log without a journal: logfmt on stderr, readable in a terminal, and just as unable to block the daemon.

A reader that stopped (`make run | less`, Ctrl-S) would stop whoever writes to it. The descriptor is opened once more,
non-blocking, so that the flag is not set for the shell that shares ours. Where that is refused, as to a container's or
`su`'s user, whose stderr is another user's pipe or terminal, it is written in pieces for which there is room.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
from collections.abc import Mapping

from vllmd.system.outbox import Outbox
from vllmd.system.sink import Outcome, Sink

_NAMES = ("EMERG", "ALERT", "CRIT", "ERROR", "WARN", "NOTICE", "INFO", "DEBUG")
_COLOURS = {0: "1;31", 1: "1;31", 2: "1;31", 3: "1;31", 4: "33", 5: "1"}
_DIM = "2"


class Stderr(Sink):
    """The fields of the instance are not repeated on every line: a terminal shows one instance."""

    def __init__(self, fields: Mapping[str, object], *, descriptor: int = 2, outbox: Outbox | None = None) -> None:
        super().__init__(fields, outbox)
        self._colour = os.isatty(descriptor) and "NO_COLOR" not in os.environ
        self._original = descriptor
        self._descriptor, self._shared = _open_again(descriptor)

    def _encode_event(self, event_id: str, message: str, priority: int, fields: Mapping[str, object]) -> bytes:
        del event_id  # for programs; a person reads the message
        name = self._painted(f"{_NAMES[priority]:<6}", _COLOURS.get(priority, _DIM))
        pairs = "".join(f" {key.lower()}={_quoted(value)}" for key, value in fields.items() if value not in ("", None))
        return f"{name} {printable(message)}{self._painted(pairs, _DIM)}\n".encode(errors="replace")

    def _encode_line(self, text: str, priority: int, fields: Mapping[str, object]) -> bytes:
        del fields
        return (self._painted(f"engine | {printable(text)}", _COLOURS.get(priority, _DIM)) + "\n").encode(errors="replace")

    def _painted(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour and text else text

    def _transmit(self, entry: bytes) -> Outcome:
        if self._descriptor < 0:
            self._descriptor, self._shared = _open_again(self._original)
        if self._shared and not _has_room(self._descriptor):
            return "blocked"
        try:
            written = os.write(self._descriptor, entry[: select.PIPE_BUF] if self._shared else entry)
        except BlockingIOError:
            return "blocked"
        except OSError:  # the terminal hung up: there is nobody to tell
            return "impossible"
        if written < len(entry):
            self._outbox.replace_head(entry[written:])
            return "blocked"
        return "sent"

    def _descriptor_now(self) -> int:
        return self._descriptor

    def _release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open_again(descriptor: int) -> tuple[int, bool]:
    """A descriptor of our own on the same terminal or pipe, non-blocking; else a copy, and whether writing to that may block."""
    with contextlib.suppress(OSError):
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode) or os.isatty(descriptor):
            with contextlib.suppress(OSError):
                return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY), False
        return os.dup(descriptor), not stat.S_ISREG(mode)
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), False


def _has_room(descriptor: int) -> bool:
    """For PIPE_BUF bytes: that is when the kernel calls a pipe or a socket writable. True also where writing fails at once."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(0))


def printable(text: str) -> str:
    """Without control characters: the engine's output must not drive the terminal."""
    if text.isprintable():  # nearly always, and a hundred times as fast
        return text
    return "".join(c if c.isprintable() or c == "\t" else " " for c in text)


def _quoted(value: object) -> str:
    text = printable(str(value))
    if text and not any(c in text for c in ' "='):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
