"""Opening a lock file that lies where others may write, /tmp at worst: neither its directory nor itself is reached through
a symlink, root uses no directory that others can write into, and a file of a stranger is not used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

from vllmd.errors import VllmdError
from vllmd.system.files import exhausted

Refused = Callable[[str], VllmdError]
"""Makes the error to raise from why the file cannot be used."""


def open_lock(path: Path, refused: Refused, *, mode: int = 0o600) -> int:
    """The descriptor, close-on-exec; the file is made where it is missing. What `refused` makes, or TryLater `host_exhausted`."""
    folder = _open_folder(path, refused)
    try:
        return _open_file(path, folder, refused, mode)
    finally:
        os.close(folder)


def _open_folder(path: Path, refused: Refused) -> int:
    if os.geteuid() == 0:
        with contextlib.suppress(FileExistsError, OSError):
            path.parent.mkdir(mode=0o755, parents=True)
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise exhausted(error, f"cannot lock {path}") or refused(f"its directory cannot be used: {error.strerror}") from None
    reason = _unsafe(os.fstat(folder))
    if reason:
        os.close(folder)
        raise refused(reason)
    return folder


def _unsafe(folder: os.stat_result) -> str:
    """Root trusts no directory that others may write into, /tmp's sticky bit or not; others need the sticky bit there."""
    others = folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others and os.geteuid() == 0:
        return "its directory can be written by others, which root does not use"
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        return "its directory can be written by everybody"
    return ""


def _open_file(path: Path, folder: int, refused: Refused, mode: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path.name, flags, mode, dir_fd=folder)
    except OSError as error:
        what = "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror)
        raise exhausted(error, f"cannot lock {path}") or refused(what) from None
    reason = _not_ours(os.fstat(fd), os.fstat(folder))
    if reason:
        os.close(fd)
        raise refused(reason)
    _give_to_folder(fd, os.fstat(folder))
    return fd


def _not_ours(file: os.stat_result, folder: os.stat_result) -> str:
    if not stat.S_ISREG(file.st_mode):
        return "it is no regular file"
    if file.st_nlink != 1:
        return "it has other hard links"
    if file.st_uid not in (os.geteuid(), folder.st_uid):
        return f"it belongs to user {file.st_uid}"
    return ""


def _give_to_folder(fd: int, folder: os.stat_result) -> None:
    """What root makes in the service's directory must not shut the service out."""
    if os.geteuid() == 0 and folder.st_uid != 0 and os.fstat(fd).st_uid == 0:
        with contextlib.suppress(OSError):
            os.fchown(fd, folder.st_uid, folder.st_gid)


def is_locked(path: Path) -> bool:
    """Whether anybody holds a lock on a file or directory, other hosts' and containers' included as far as the file system tells. For an
    instant it holds the exclusive lock itself, which who comes just then waits out. False where it cannot be told."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # NFS wants it opened for writing
    finally:
        os.close(fd)
    return False
