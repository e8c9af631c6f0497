"""The port's lock: one preflight, or one start, at a time. It lives as long as its file descriptor.

A lock file lies where others may write, /tmp at worst: neither its directory nor itself is reached through a symlink,
and root does not use a directory that others can write into.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vllmd.errors import PermissionMissing, TryLater
from vllmd.system.files import exhausted


@dataclass(slots=True)
class Lock:
    """A lock that is held. Closed by `release`, the end of a `with`, or the process's exec unless `keep_over_exec`."""

    path: Path
    fd: int

    def release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def keep_over_exec(self) -> None:
        """Let the program that is executed next hold it, for its whole life."""
        os.set_inheritable(self.fd, True)  # noqa: FBT003 - the standard library's own signature

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()


def default_path(port: int, runtime: Path, environ: Mapping[str, str], uid: int) -> Path:
    """Where the lock of a port lies when nobody says: the runtime directory (its locks/, which is the service's, where
    that exists), the user's own, and only for people without either /tmp."""
    name = f"preflight.{port}.lock"
    for folder in (runtime / "locks", runtime):
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return folder / name
    if uid == 0:
        return runtime / name
    own = environ.get("XDG_RUNTIME_DIR", "")
    if own.startswith("/") and os.access(own, os.W_OK | os.X_OK):
        return Path(own) / f"vllmd-{name}"
    return Path("/tmp/vllm-preflight.lock")


def take(path: Path) -> Lock:
    """Take the lock without waiting. TryLater `lock_held` with the holder's pid; PermissionMissing `lock_refused` where
    the file or its directory is not safe to use."""
    folder = _open_folder(path)
    try:
        fd = _open_file(path, folder)
    finally:
        os.close(folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = _holder(fd)
        os.close(fd)
        raise TryLater("lock_held", f"{path} is locked{holder}", "Another preflight or start is at work on this port: wait for it.") from None
    _sign(fd)
    return Lock(path, fd)


def _open_folder(path: Path) -> int:
    if os.geteuid() == 0:
        with contextlib.suppress(FileExistsError, OSError):
            path.parent.mkdir(mode=0o755, parents=True)
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise exhausted(error, f"cannot lock {path}") or _refused(path, f"its directory cannot be used: {error.strerror}") from None
    reason = _unsafe(os.fstat(folder))
    if reason:
        os.close(folder)
        raise _refused(path, reason)
    return folder


def _unsafe(folder: os.stat_result) -> str:
    """Root trusts no directory that others may write into, /tmp's sticky bit or not; others need the sticky bit there."""
    others = folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others and os.geteuid() == 0:
        return "its directory can be written by others, which root does not use"
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        return "its directory can be written by everybody"
    return ""


def _open_file(path: Path, folder: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path.name, flags, 0o600, dir_fd=folder)
    except OSError as error:
        what = "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror)
        raise exhausted(error, f"cannot lock {path}") or _refused(path, what) from None
    reason = _not_ours(os.fstat(fd), os.fstat(folder))
    if reason:
        os.close(fd)
        raise _refused(path, reason)
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
    """What root makes in the service's locks/ must not shut the service out."""
    if os.geteuid() == 0 and folder.st_uid != 0 and os.fstat(fd).st_uid == 0:
        with contextlib.suppress(OSError):
            os.fchown(fd, folder.st_uid, folder.st_gid)


def _refused(path: Path, reason: str) -> PermissionMissing:
    return PermissionMissing("lock_refused", f"the lock file {path} is refused: {reason}", "Set VLLM_PREFLIGHT_LOCKFILE to a file in a directory of your own.")


def _holder(fd: int) -> str:
    with contextlib.suppress(OSError):
        text = os.pread(fd, 32, 0).decode(errors="replace").strip()
        if text.isdigit():
            return f" by process {text}"
    return ""


def _sign(fd: int) -> None:
    """The pid is for people; the lock itself is the flock."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
