"""A command in a real pseudo-terminal, and what a person would see on it: pyte reads what the command writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import pyte


class Terminal:
    """`screen` is pyte's; `raw` all bytes that were written."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], columns: int = 80, lines: int = 24) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = bytearray()
        self._master, self._slave = pty.openpty()
        self._set_size(columns, lines)
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(argv, stdin=self._slave, stdout=self._slave, stderr=self._slave, env=dict(env), start_new_session=True, preexec_fn=self._own)

    @staticmethod
    def _own() -> None:
        """It is the controlling terminal: Ctrl-C there is a signal."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)
        os.killpg(self.process.pid, signal.SIGWINCH)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read(self, timeout_s: float = 0.1) -> bool:
        """Takes what has been written; whether there was something."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            return False
        data = os.read(self._master, 1 << 16)
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    @property
    def display(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.display)

    def wait(self, what: str, holds: Callable[[list[str]], object], timeout_s: float = 30.0) -> list[str]:
        """Until the screen is so; fails with the screen as it is."""
        end = time.monotonic() + timeout_s
        while not holds(self.display):
            assert time.monotonic() < end, f"never seen: {what}\n{self.text}"
            self.read()
        return self.display

    def wait_text(self, text: str, timeout_s: float = 30.0) -> list[str]:
        return self.wait(text, lambda _lines: text in self.text, timeout_s)

    def wait_exit(self, timeout_s: float = 20.0) -> int:
        end = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it runs still\n{self.text}"
            self.read()
        while self.read(0.05):
            pass
        return self.process.returncode

    @property
    def is_sane(self) -> bool:
        """As it was before: echo, lines, signals; the cursor is there, and the alternate screen is left."""
        left = self.raw.rfind(b"\x1b[?1049l") > self.raw.rfind(b"\x1b[?1049h") or b"\x1b[?1049h" not in self.raw
        return termios.tcgetattr(self._slave) == self.before and not self.screen.cursor.hidden and left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(10)
        os.close(self._master)
        os.close(self._slave)
