"""One resolution of a model at a time: a flock per identity in the store, so that two hosts' or users' tools with other caches meet on it too.

A lock file is an attractive target in a shared directory: it is opened without following links, must be a regular file
with one name, and must belong to this user, to root, or to the owner of the store.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vllmd.errors import PermissionMissing, TryLater
from vllmd.models.ioerrors import explained
from vllmd.models.places import present

DIRECTORY = ".locks"
POLL_S = 0.05
SAY_AGAIN_S = 10.0


@contextmanager
def locked(store: Path, hash12: str, timeout_s: float, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the identity's lock. `waiting` is told who holds it, at once and then every 10 s. TryLater after `timeout_s`."""
    path = store / DIRECTORY / f"vllm-model.{hash12}.lock"
    with explained(f"open {path}"):
        fd = _open(store, path)
    try:
        _acquire(fd, path, timeout_s, waiting)
        _sign(fd)
        yield
    finally:
        os.close(fd)


def private_directory(store: Path, name: str) -> Path:
    """A directory of ours in the store, made if missing, like the store itself; it gets the owner of what it is made in, so
    that a command that root ran once does not leave behind what the service cannot write. OSError."""
    path = store / name
    if store != store.parent and not present(store):
        private_directory(store.parent, store.name)
    owner = store.stat()
    try:
        path.mkdir(mode=0o755)
        if os.geteuid() == 0:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    except FileExistsError:
        if path.is_symlink():
            raise _refused(path, "is a link") from None
    return path


def _open(store: Path, path: Path) -> int:
    directory = os.open(private_directory(store, DIRECTORY), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _open_in(directory, path, store.stat())
    finally:
        os.close(directory)


def _open_in(directory: int, path: Path, store: os.stat_result) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path.name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        if os.geteuid() == 0:
            os.fchown(fd, store.st_uid, store.st_gid)
    except FileExistsError:
        mode = os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode) or stat.S_ISDIR(mode):
            raise _refused(path, "is a link" if stat.S_ISLNK(mode) else "is a directory") from None
        fd = os.open(path.name, flags, dir_fd=directory)
    status = os.fstat(fd)
    reason = _distrusted(status, store.st_uid)
    if reason:
        os.close(fd)
        raise _refused(path, reason)
    return fd


def _distrusted(status: os.stat_result, store_owner: int) -> str:
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        return "is no plain file"
    if status.st_uid not in (os.geteuid(), 0, store_owner):
        return f"belongs to uid {status.st_uid}, neither this user, nor root, nor the store's owner"
    return ""


def _refused(path: Path, reason: str) -> PermissionMissing:
    return PermissionMissing("lock_refused", f"{path}: {reason}; refused as a lock", f"Look who made it, then: rm {path}")


def _acquire(fd: int, path: Path, timeout_s: float, waiting: Callable[[str], None]) -> None:
    started = time.monotonic()
    said = -SAY_AGAIN_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - started
        if waited >= timeout_s:
            what = f"{path} is held by {_holder(fd)}; waited {waited:.0f} s"
            raise TryLater("model_locked", what, "Another resolution of this model runs; wait for it, or end it.")
        if waited - said >= SAY_AGAIN_S:
            said = waited
            waiting(f"waiting for {_holder(fd)}, who resolves the same model ({waited:.0f} s of {timeout_s:.0f} s)")
        time.sleep(min(POLL_S, max(timeout_s - waited, 0.001)))


def _sign(fd: int) -> None:
    """Who holds it, for those who wait. A disk too full for that is no reason to stop."""
    text = f"pid {os.getpid()} on {socket.gethostname()}\n".encode()
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, text, 0)
    except OSError:
        pass


def _holder(fd: int) -> str:
    text = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
    return text if text.isprintable() and text else "another process"
