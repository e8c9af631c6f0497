"""The model store: verified models of this host, shared by its instances.

    models/<slug>.<hash12>      link to .published/<slug>.<hash12>/<manifest sha256>/, swapped by one rename
    models/NAME                 a user's own directory, used in place and never changed; or a link to what is published
    models/.locks/              one lock per identity
    models/.manifests/          manifests of users' own directories, and sums that were checked

Reads what is published and what the existing tools left (NAME.HASH12 with a provenance file).
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vllmd.core.plan import ModelRequest
from vllmd.errors import TryLater
from vllmd.models.identity import hash12
from vllmd.models.ioerrors import explained
from vllmd.models.places import is_directory, is_real_directory, present

PUBLISHED = ".published"


def published_target(store: Path, link: Path) -> Path | None:
    """Where a link of the store leads, if that is a version below .published; else None. OSError."""
    real = Path(os.path.realpath(link))
    below = Path(os.path.realpath(store / PUBLISHED))
    is_version = real.is_relative_to(below) and len(real.relative_to(below).parts) == 2 and is_directory(real)
    return real if is_version else None


def manifest_name(directory: Path) -> str:
    """The manifest's SHA-256 that names a published version; '' for any other directory."""
    is_published = directory.parent.parent.name == PUBLISHED and re.fullmatch("[0-9a-f]{64}", directory.name)
    return directory.name if is_published else ""


def recover(store: Path, request: ModelRequest, warn: Callable[[str], None]) -> None:
    """Put back what a crash between the existing tool's two renames left as NAME.bak.RANDOM. Needs the lock."""
    for name in (request.name, f"{request.name}.{hash12(request.identity)}"):
        target = store / name
        if not request.name or present(target):
            continue
        backups = [path for path in store.glob(f"{_literal(name)}.bak.*") if is_real_directory(path)]
        if backups:
            _restore(max(backups, key=lambda path: path.stat().st_mtime_ns), target, warn)


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
    """A shared lock on a model's directory; as long as it is open, nothing collects the directory."""

    fd: int

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def hold(directory: Path, timeout_s: float = 5.0) -> Held:
    """Mark the model in use. The lock is on the directory itself, so it works on a read-only file system and writes nothing
    into a user's own directory. TryLater while it is being collected; it does not survive an exec (close on exec)."""
    with explained(f"open {directory}"):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + timeout_s
    try:
        while not _shared(fd):
            if time.monotonic() >= deadline:
                raise TryLater("model_collected", f"{directory} is being removed", "Start again: the model is resolved anew.")
            time.sleep(0.02)
        with explained(f"open {directory}"):
            if not os.path.samestat(os.fstat(fd), directory.stat()):
                raise TryLater("model_replaced", f"{directory} was replaced meanwhile", "Start again.")
    except BaseException:
        os.close(fd)
        raise
    return Held(fd)


def _shared(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
