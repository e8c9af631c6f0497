"""The model store: verified models of this host, shared by its instances.

    models/<slug>.<hash12>      link to .published/<slug>.<hash12>/<manifest sha256>/, swapped by one rename
    models/NAME                 a user's own directory, used in place and never changed; or a link to what is published
    models/.locks/              one lock per identity
    models/.staging/<label>/    what is being fetched; models/.trash/ what is being removed; models/.pins/ what must stay
    models/.manifests/          manifests of users' own directories, and sums that were checked

Reads what is published and what the existing tools left (NAME.HASH12 with a provenance file).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vllmd.core.model import ModelRequest
from vllmd.errors import TryLater
from vllmd.models.identity import hash12, label
from vllmd.models.ioerrors import explained
from vllmd.models.places import is_directory, is_real_directory, present

PUBLISHED = ".published"
USE_LOCK = ".complete"
"""In a published version: locked like the directory itself. Over NFS a directory's lock is seen by the same host only."""


def published_target(store: Path, link: Path) -> Path | None:
    """Where a link of the store leads, if that is a version below .published; else None. OSError."""
    try:
        real = Path(os.path.realpath(link))
    except FileNotFoundError:  # removed between two looks
        return None
    below = Path(os.path.realpath(store / PUBLISHED))
    is_version = real.is_relative_to(below) and len(real.relative_to(below).parts) == 2 and is_directory(real)
    return real if is_version else None


def manifest_name(directory: Path) -> str:
    """The manifest's SHA-256 that names a published version; '' for any other directory."""
    is_published = directory.parent.parent.name == PUBLISHED and re.fullmatch("[0-9a-f]{64}", directory.name)
    return directory.name if is_published else ""


def recover(store: Path, request: ModelRequest, warn: Callable[[str], None]) -> None:
    """Put back what a crash between two renames, by us or by the existing tool, left as NAME.bak.RANDOM. A person's own
    copies have such names too: those stay where they are. Needs the lock."""
    names = (request.name, f"{request.name}.{hash12(request.identity)}") if request.name else ()
    for name in dict.fromkeys((*names, label(request))):
        target = store / name
        if present(target):
            continue
        backups = [path for path in store.glob(f"{_literal(name)}.bak.*") if _was_left(path, name, request)]
        if backups:
            _restore(max(backups, key=lambda path: path.stat().st_mtime_ns), target, warn)


def _was_left(backup: Path, name: str, request: ModelRequest) -> bool:
    """Ours is named by eight hex digits and was under <label>, a name that nobody but us gives; the tools' was complete."""
    if not is_real_directory(backup):
        return False
    if name == label(request) and re.fullmatch(r"[0-9a-f]{8}", backup.name.rpartition(".")[2]):
        return True
    return any(present(backup / mark) for mark in (USE_LOCK, ".vllm-model-provenance"))


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _restore(backup: Path, target: Path, warn: Callable[[str], None]) -> None:
    try:
        backup.rename(target)
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.fsync(directory)
        os.close(directory)
    except OSError as error:
        warn(f"{backup} could not be restored as {target.name}: {error.strerror}")
    else:
        warn(f"restored {target} from {backup.name}, which an interrupted replacement had left")


@dataclass(slots=True)
class Held:
    """Shared locks on a model's directory; as long as they are held, nothing collects the directory."""

    locks: ExitStack

    def close(self) -> None:
        self.locks.close()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def hold(directory: Path, timeout_s: float = 5.0) -> Held:
    """Mark the model in use, and when it was used last. The lock is on the directory itself, so it works on a read-only file
    system and writes nothing into a user's own directory. TryLater while it is being collected, or where that is done; the
    lock does not survive an exec (close on exec)."""
    with ExitStack() as stack, explained(f"open {directory}"):
        try:
            _hold(directory, time.monotonic() + timeout_s, stack)
        except FileNotFoundError:
            raise _replaced(directory) from None
        _note_use(directory)
        return Held(stack.pop_all())


def _hold(directory: Path, deadline: float, stack: ExitStack) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    _share(fd, directory, deadline)
    if manifest_name(directory):
        _share_use_lock(fd, directory, deadline, stack)
    # It may have been renamed into the trash between the open and the lock.
    if not os.path.samestat(os.fstat(fd), directory.stat()):
        raise _replaced(directory)


def _share_use_lock(directory_fd: int, directory: Path, deadline: float, stack: ExitStack) -> None:
    """Without it the lock on the directory has to do: versions that others made have none."""
    try:
        fd = os.open(USE_LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES):
            return
        raise
    stack.callback(os.close, fd)
    _share(fd, directory, deadline)


def _share(fd: int, directory: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TryLater("model_collected", f"{directory} is being removed", "Start again: the model is resolved anew.") from None
        time.sleep(0.02)


def _replaced(directory: Path) -> TryLater:
    return TryLater("model_replaced", f"{directory} was removed or replaced meanwhile", "Start again: the model is resolved anew.")


def _note_use(directory: Path) -> None:
    """A version's own times say when it was used last; where they cannot be set, nobody will know."""
    if manifest_name(directory):
        with contextlib.suppress(OSError):
            os.utime(directory)
