"""The port's lock: one preflight, or one start, at a time. It lives as long as its file descriptor."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vllmd.errors import PermissionMissing, TryLater
from vllmd.system.lockfile import open_lock


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
    fd = open_lock(path, lambda reason: _refused(path, reason))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = _holder(fd)
        os.close(fd)
        raise TryLater("lock_held", f"{path} is locked{holder}", "Another preflight or start is at work on this port: wait for it.") from None
    _sign(fd)
    return Lock(path, fd)


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
