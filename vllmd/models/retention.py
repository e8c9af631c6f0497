"""Which versions stay, and how one goes: never one in use, one that is pinned, or the one that the link leads to.

A version in use has a shared lock, by whoever serves it (models/store hold). It is removed under the exclusive one: first
renamed into STORE/.trash, then deleted, so that a crash in between leaves nothing half there. Clocks play no part in what is
kept of two versions, as one set back would otherwise take away the wrong one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllmd.errors import TryLater, VllmdError
from vllmd.models import durable, kept, links, pins, published
from vllmd.models.ioerrors import explained
from vllmd.models.lock import locked, private_directory
from vllmd.models.places import is_real_directory, present
from vllmd.models.store import PUBLISHED, USE_LOCK, manifest_name

TRASH = ".trash"
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Removed:
    """`bytes` were freed: what other versions share is not counted."""

    directory: Path
    bytes: int


@dataclass(frozen=True, slots=True)
class InUse:
    """It stays. `reason` follows on its path: 'is in use'."""

    directory: Path
    reason: str


def retain(store: Path, current: Path, previous: Path | None, keep: int, tell: Tell) -> list[Removed | InUse]:
    """Of the versions beside `current`, the newest of this identity, `keep` stay with it: `previous`, which the link led to
    before, and then the newest. Needs the identity's lock. It never fails: what cannot be removed stays, and is told."""
    try:
        results = [_remove(store, directory) for directory in _surplus(store, current, previous, keep)]
    except (OSError, VllmdError) as error:
        tell(f"old versions in {current.parent} stay: {error}")
        return []
    for result in results:
        tell(f"removed {result.directory}" if isinstance(result, Removed) else f"{result.directory} stays: it {result.reason}")
    return results


def _surplus(store: Path, current: Path, previous: Path | None, keep: int) -> list[Path]:
    pinned, led_to = pins.pinned(store) | kept.versions(store), links.leading_to(store)
    own = [path for path in published.directories(store) if path.parent.name == current.parent.name]
    before = previous.name if previous is not None else ""
    ranked = sorted(own, key=lambda path: (path.name == current.name, *_rank(path, before)), reverse=True)
    return [path for path in ranked[max(keep, 1) :] if path.name not in pinned and os.path.realpath(path) not in led_to]


def _rank(directory: Path, before: str) -> tuple[bool, bool, str]:
    """One that nobody could go back to takes the place of none that is whole."""
    contents = published.manifest_of(directory)
    if contents is None:
        return False, False, ""
    return not published.fault(directory, contents), directory.name == before, contents.created_at


def remove_version(store: Path, directory: Path) -> Removed | InUse:
    """Remove a published version, and the store's links to it, if nobody uses it or works on its model. Whether it is pinned
    or current is for the caller to ask. StorageFailed, PermissionMissing; ValueError for what is no published version."""
    if os.path.realpath(directory.parent.parent) != os.path.realpath(store / PUBLISHED) or not manifest_name(directory):
        raise ValueError(f"{directory} is no published version of {store}")
    with explained(f"remove {directory}"), ExitStack() as stack:
        problem = lock_label(store, directory.parent.name, stack)
        result = InUse(directory, problem) if problem else _remove(store, directory)
        with contextlib.suppress(OSError):
            directory.parent.rmdir()  # if that was its last version
        return result


def lock_label(store: Path, label: str, stack: ExitStack) -> str:
    """Takes the lock of the label's identity; else who has it, as what follows on a path."""
    try:
        stack.enter_context(locked(store, label.rpartition(".")[2], 0, lambda _text: None))
    except TryLater as error:
        return f"is being worked on: {error.what}"
    return ""


def _remove(store: Path, directory: Path) -> Removed | InUse:
    if not present(directory):
        return Removed(directory, 0)  # by whoever had the lock before
    with unused(directory) as problem:
        if problem:
            return InUse(directory, problem)
        for link in links.leading_to(store).get(os.path.realpath(directory), []):
            link.unlink()
        durable.sync_directory(store)
        freed, doomed = size(directory), discard(store, directory)
        published.forget_damage(directory)
    # No lock from here on: who waited for it sees at once that the version is gone, and not after the deletion.
    shutil.rmtree(doomed, ignore_errors=True)
    return Removed(directory, freed)


def discard(store: Path, path: Path) -> Path:
    """Rename into the trash, durable, so that nothing half of it stays in its place; where it is now. OSError."""
    doomed = private_directory(store, TRASH) / os.urandom(8).hex()
    path.rename(doomed)
    durable.sync_directory(path.parent)
    durable.sync_directory(doomed.parent)
    return doomed


@contextmanager
def unused(directory: Path) -> Iterator[str]:
    """Nobody can begin to use the version meanwhile; else why that is not so, as what follows on its path. OSError."""
    with ExitStack() as stack:
        yield _claimed(directory, stack)


def _claimed(directory: Path, stack: ExitStack) -> str:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    fds = [fd]
    # A lock on a directory is this host's alone where the store is on NFS; one on a file, opened to be written, is everybody's.
    with contextlib.suppress(FileNotFoundError):
        fds.append(os.open(USE_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd))
        stack.callback(os.close, fds[-1])
    for each in fds:
        try:
            fcntl.flock(each, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "is in use"
    return ""


def size(directory: Path) -> int:
    """Bytes that go with it: files with other names elsewhere are not counted. OSError."""
    return sum(status.st_size for path in durable.files(directory) if (status := path.lstat()).st_nlink == 1)


def empty_trash(store: Path, tell: Tell) -> None:
    """Delete what an interrupted removal left. Safe at any time, also while others do the same. OSError."""
    trash = store / TRASH
    if not is_real_directory(trash):
        return
    for path in list(trash.iterdir()):
        shutil.rmtree(path, ignore_errors=True)
        if present(path):
            tell(f"{path} could not be deleted; the next publication tries again")
