"""One resolution of a model at a time: a flock per identity in the store, so that two hosts' or users' tools with other caches meet on it too.

The holder writes into the lock file who it is and how far it came. Who waits shows that, and gives up only on a holder that
makes no progress: another instance may download for hours.

A lock file is an attractive target in a shared directory: it is opened without following links, must be a regular file
with one name, and must belong to this user, to root, or to the owner of the store.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllmd.errors import PermissionMissing, TryLater
from vllmd.models.ioerrors import explained
from vllmd.models.places import present

DIRECTORY = ".locks"
DIRECTORY_MODE = 0o755
POLL_S = 0.05
SAY_AGAIN_S = 10.0
SAY_S = 1.0
SAID_CHARS = 100


@dataclass(slots=True)
class Lock:
    """The identity's lock, held."""

    fd: int
    store: Path
    path: Path
    said_at: float = float("-inf")

    def say(self, text: str) -> None:
        """How far the holder came, for those who wait; they wait on as long as it changes. Once a second at most is written.
        A disk too full for that is no reason to stop."""
        self.keep()
        now = time.monotonic()
        if now - self.said_at >= SAY_S:
            self.said_at = now
            _sign(self.fd, text)

    def keep(self) -> None:
        """Somebody removed the lock file by hand: whoever came after that locked another file, and two wrote into one stage.
        The lock is taken anew under its name; TryLater where another has it by now."""
        if _is_at(self.fd, self.path):
            return
        with explained(f"open {self.path}"):
            fd = _open(self.store, self.path)
        if not _taken(fd):
            holder = _holder(fd)
            os.close(fd)
            what = f"{self.path} was removed while it was held, and {holder} has taken it since"
            raise TryLater("lock_lost", what, "Never remove a lock file; what was fetched is kept, start again.")
        os.close(self.fd)
        self.fd, self.said_at = fd, float("-inf")
        if not _is_at(fd, self.path):
            self.keep()


@contextmanager
def locked(store: Path, hash12: str, timeout_s: float, waiting: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the identity's lock. `waiting` is told who holds it, at once and then every 10 s. TryLater after `timeout_s` in
    which the holder said nothing new."""
    path = store / DIRECTORY / f"vllm-model.{hash12}.lock"
    with explained(f"open {path}"):
        lock = Lock(_open(store, path), store, path)
    try:
        while True:
            _acquire(lock.fd, path, timeout_s, waiting)
            if _is_at(lock.fd, path):
                break
            # It was removed while we waited: others meet on the file that has the name now.
            with explained(f"open {path}"):
                fresh = _open(store, path)
            os.close(lock.fd)
            lock.fd = fresh
        _sign(lock.fd)
        yield lock
    finally:
        os.close(lock.fd)


def private_directory(store: Path, name: str) -> Path:
    """A directory of ours in the store, made if missing, like the store itself; it gets the owner of what it is made in, so
    that a command that root ran once does not leave behind what the service cannot write, and its mode whatever the umask is:
    who may not read .published has no models. PermissionMissing for a link, for what is no directory, and for another user's:
    who owns it may put a link into our way while we write. OSError."""
    path = store / name
    _make_missing(store)
    owner = store.stat()
    try:
        path.mkdir(mode=DIRECTORY_MODE)
    except FileExistsError:
        reason = _unfit(path, owner.st_uid)
        if reason:
            raise _refused_directory(path, reason) from None
        return path
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.geteuid() == 0:
            os.fchown(fd, owner.st_uid, owner.st_gid)
        os.fchmod(fd, DIRECTORY_MODE)
    finally:
        os.close(fd)
    return path


def _make_missing(path: Path) -> None:
    """The store and what it lacks above; their mode is the umask's affair."""
    if path == path.parent or present(path):
        return
    _make_missing(path.parent)
    owner = path.parent.stat()
    path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _unfit(path: Path, store_owner: int) -> str:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return "is a link" if stat.S_ISLNK(status.st_mode) else "is no directory"
    return _foreign(status, store_owner)


def _refused_directory(path: Path, reason: str) -> PermissionMissing:
    hint = f"Look who made it, then move it out of the way: mv {path} {path}.old; it is made anew."
    return PermissionMissing("lock_refused", f"{path}: {reason}; only a plain directory of the store's owner will do", hint)


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
    return _foreign(status, store_owner)


def _foreign(status: os.stat_result, store_owner: int) -> str:
    if status.st_uid in (os.geteuid(), 0, store_owner):
        return ""
    return f"belongs to uid {status.st_uid}, neither this user, nor root, nor the store's owner"


def _refused(path: Path, reason: str) -> PermissionMissing:
    return PermissionMissing("lock_refused", f"{path}: {reason}; refused as a lock", f"Look who made it, then: rm {path}")


def _acquire(fd: int, path: Path, timeout_s: float, waiting: Callable[[str], None]) -> None:
    seen, told = _holder(fd), float("-inf")
    since = time.monotonic()
    while not _taken(fd):
        now = time.monotonic()
        holder = _holder(fd)
        if holder != seen:
            seen, since = holder, now
        if now - since >= timeout_s:
            what = f"{path} is held by {holder}; waited {now - since:.0f} s without seeing progress"
            raise TryLater("model_locked", what, "Another resolution of this model runs; wait for it, or end it.")
        if now - told >= SAY_AGAIN_S:
            told = now
            waiting(f"waiting for {holder}, which resolves the same model (gives up after {timeout_s:.0f} s without progress)")
        time.sleep(min(POLL_S, max(timeout_s - (now - since), 0.001)))


def _is_at(fd: int, path: Path) -> bool:
    """Whether the name still leads to the file; where that cannot be seen nothing was removed."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(fd: int, text: str = "") -> None:
    """Who holds it, and how far it is. Overwritten before it is cut, so that no reader finds it empty."""
    shown = "".join(char for char in text if char.isprintable())[:SAID_CHARS]
    line = f"pid {os.getpid()} on {os.uname().nodename}{': ' if shown else ''}{shown}\n".encode()
    try:
        os.pwrite(fd, line, 0)
        os.ftruncate(fd, len(line))
    except OSError:
        pass


def _holder(fd: int) -> str:
    text = os.pread(fd, 500, 0).decode("utf-8", "replace").partition("\n")[0].strip()
    return text if text.isprintable() and text else "another process"
