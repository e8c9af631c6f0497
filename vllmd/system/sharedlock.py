"""Directories in use: a shared lock on the directory itself for as long as somebody needs it, and the exclusive one of who
removes it. Nothing is written, so it works on a read-only file system; the kernel releases it with the process.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from vllmd.errors import TryLater


def share(directory: Path, *, inherited: bool = False) -> Callable[[], None]:
    """Marks the directory in use until what is returned is called (or, `inherited`, until the program that this process
    becomes has ended). TryLater where it is being removed; OSError where there is none. Where its file system knows no
    locks nothing is marked."""
    with ExitStack() as stack:
        descriptor = _opened(directory)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _going(directory) from None
        except OSError:  # a network file system without locks
            return stack.pop_all().close
        if not os.path.samestat(os.fstat(descriptor), directory.stat()):  # renamed away between the open and the lock
            raise _going(directory)
        os.set_inheritable(descriptor, inherited)
        return stack.pop_all().close


def claim(directory: Path) -> Callable[[], None] | None:
    """The exclusive lock, until what is returned is called; None while somebody uses it. OSError."""
    descriptor = _opened(directory)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return lambda: os.close(descriptor)


def _opened(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _going(directory: Path) -> TryLater:
    return TryLater("being_removed", f"{directory} is being removed", "start again: what it was is chosen or made anew")
