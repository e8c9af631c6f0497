"""Looking without being held up: each look is a child of its own, under a deadline, all of them at once.

Children and not threads: a thread in a call of a driver or of a file server that never returns keeps its whole process from
ending, and whoever waits for that. A child that is stuck is killed and left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllmd.errors import VllmdError

T = TypeVar("T")
_REAP_S = 0.3
_CHUNK = 1 << 16
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """`value` is None where it could not be looked; `why` says it then."""

    value: T | None = None
    why: str = ""


class Job(Generic[T]):
    """A look under way."""

    def __init__(self, look: Callable[[], T], timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s
        self._fd, writing = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _perform(look, writing, parent)
        os.close(writing)

    def outcome(self) -> Outcome[T]:
        """Waits, until the deadline of the job at most. Once."""
        data, is_whole = _read(self._fd, self._until)
        os.close(self._fd)
        _end(self._pid)
        if not is_whole:
            return Outcome(why=f"no answer within {self.timeout_s:g} s")
        if not data:
            return Outcome(why="it ended without an answer")
        value, why = pickle.loads(data)  # of our own child
        return Outcome(value, why)


def _perform(look: Callable[[], object], writing: int, parent: int) -> None:
    """In the child; never returns."""
    try:
        os.setsid()
        # Ctrl-C ends whoever waits, and not this session: a look into a network that swallows everything went on for minutes.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            return
        data = pickle.dumps(_looked(look))
        while data:
            data = data[os.write(writing, data) :]
    finally:
        os._exit(0)


def _looked(look: Callable[[], object]) -> tuple[object, str]:
    try:
        return look(), ""
    except VllmdError as error:
        return None, error.what
    except Exception as error:  # what one look cannot bear must not cost the others
        return None, f"{type(error).__name__}: {error}"


def _read(fd: int, until: float) -> tuple[bytes, bool]:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    data = bytearray()
    while True:
        if not poller.poll(max(0.0, until - time.monotonic()) * 1000):
            return bytes(data), False
        piece = os.read(fd, _CHUNK)
        if not piece:
            return bytes(data), True
        data += piece


def _end(pid: int) -> None:
    """With what it started; what is stuck in the kernel is left behind."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    until = time.monotonic() + _REAP_S
    while time.monotonic() < until:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.005)
                continue
        return
