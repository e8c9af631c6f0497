"""Makes a fetched model the one that is served, in one step, and says what is published already.

    STORE/.staging/<label>/files   ->  STORE/.published/<label>/<manifest sha256>/   one rename, after everything is on the disk
    STORE/<label>                  ->  a link to that, swapped by one rename
    STORE/.published/<label>/<manifest sha256>.damaged   which of a version's files were found to be wrong

A power cut or a kill at any instant leaves the link on the old version or on the new one, both whole: nothing that is
published is written to again (versions share files by hard link), and what is old goes only when the new link is durable.
All of it under the identity's lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vllmd.core.model import ModelRequest
from vllmd.errors import StorageFailed
from vllmd.models import contents as manifests
from vllmd.models import durable, links, provenance, published, retention
from vllmd.models.contents import Contents, Entry
from vllmd.models.identity import hash12, label
from vllmd.models.inventory import OWN_FILES
from vllmd.models.ioerrors import translated
from vllmd.models.lock import private_directory
from vllmd.models.places import is_real_directory, present
from vllmd.models.published import damaged, fault, forget_damage, manifest_of, mark_damaged, versions
from vllmd.models.remote import Listing
from vllmd.models.store import PUBLISHED, USE_LOCK, published_target
from vllmd.system.files import storage_error

__all__ = ["check_place", "current", "damaged", "mark_damaged", "publish", "reusable"]

Tell = Callable[[str], None]


def current(store: Path, request: ModelRequest) -> tuple[Path, Contents] | None:
    """What the identity's link leads to, with its manifest. None where there is nothing, or it is not whole: its manifest is
    damaged, files are missing, or some were found to be wrong. OSError."""
    directory = published_target(store, store / label(request))
    if directory is None or directory.parent.name != label(request):
        return None
    contents = manifest_of(directory)
    return None if contents is None or fault(directory, contents) else (directory, contents)


def reusable(store: Path, listing: Listing) -> Mapping[str, tuple[Path, Entry]]:
    """Listed name -> an identical file of any published version: the same sum, or the same pin of the same origin. Never one
    that was found to be wrong. Its size is checked, no byte is read. OSError."""
    sizes = {file.size for file in listing.files}
    by_sum: dict[tuple[int, str], tuple[Path, Entry]] = {}
    by_pin: dict[tuple[int, str, str], tuple[Path, Entry]] = {}
    for directory, contents in versions(store):
        wrong = damaged(directory)
        for name, entry in contents.files.items():
            if entry.size in sizes and name not in wrong:
                by_sum.setdefault((entry.size, entry.sha256), (directory / name, entry))
                if entry.pin and contents.origin == listing.origin:
                    by_pin.setdefault((entry.size, entry.pin, name), (directory / name, entry))
    found: dict[str, tuple[Path, Entry]] = {}
    for file in listing.files:
        sha256 = file.sums.get("sha256", "")
        same = by_sum.get((file.size, sha256)) if sha256 else by_pin.get((file.size, file.pin, file.name))
        if same is not None and _is_file(same[0], file.size):
            found[file.name] = same
    return found


def _is_file(path: Path, size: int) -> bool:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def publish(store: Path, request: ModelRequest, stage: Path, contents: Contents, keep: int, tell: Tell) -> Path:
    """The published directory. `stage` holds exactly the files of `contents`, verified, and is gone afterwards. Of the
    identity's versions `keep` stay, and all that are in use or pinned. StorageFailed, PermissionMissing: then what was
    published is as it was, and the stage is there for the next attempt."""
    with _explained(f"publish {request.identity} in {store}"):
        retention.empty_trash(store, tell)
        directory = _home(store, request) / contents.sha256
        _check_stage(stage, contents, directory)
        _complete(store, request, stage, contents, tell)
        _place(store, stage, directory, contents)
        previous = published_target(store, store / label(request))
        _link(store, request, directory, tell)
        real = Path(os.path.realpath(directory))
    retention.retain(store, directory, previous, keep, tell)
    return real


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Here the file system's answers speak of the store, never of the model, other than where a model is read."""
    try:
        yield
    except OSError as error:
        is_permission = error.errno in (errno.EACCES, errno.EPERM)
        raise (translated(error, what) if is_permission else storage_error(error, what)) from error


def check_place(store: Path, request: ModelRequest, stage: Path) -> None:
    """What would refuse the publication whatever is fetched is said before the first byte. PermissionMissing, StorageFailed;
    OSError."""
    home = store
    for name in (PUBLISHED, label(request)):
        if not present(home / name):
            break
        home = private_directory(home, name)
    _check_file_system(stage, home)


def _home(store: Path, request: ModelRequest) -> Path:
    """STORE/.published/<label>, durable, without links that an interrupted swap left."""
    home = private_directory(private_directory(store, PUBLISHED), label(request))
    durable.sync_directory(home.parent)
    durable.sync_directory(store)
    with contextlib.suppress(OSError):  # the store itself may be new, or in a directory that is none of our business
        durable.sync_directory(store.parent)
    links.clear_unfinished(home)
    published.forget_removed(home)
    return home


def _check_stage(stage: Path, contents: Contents, directory: Path) -> None:
    """The last look before it is served: these files, of these sizes, no links, and on one file system with the store."""
    if stage.is_symlink():
        raise _changed(stage, "is a link")
    _check_file_system(stage, directory.parent)
    for path in durable.files(stage):
        name = str(path.relative_to(stage))
        if name not in contents.files and name not in OWN_FILES:
            raise _changed(path, "is no file of this model")
    for name, entry in contents.files.items():
        if not _is_file(stage / name, entry.size):
            raise _changed(stage / name, f"is not the file of {entry.size} bytes that was fetched")
    for name in damaged(directory) & contents.files.keys():
        if present(directory / name) and (stage / name).samefile(directory / name):
            (stage / name).unlink()
            raise _changed(stage / name, "is the very file that was found damaged")


def _check_file_system(stage: Path, home: Path) -> None:
    if stage.stat().st_dev != home.stat().st_dev:
        what = f"{stage} and {home} are on two file systems: a model cannot be moved between them in one step"
        raise StorageFailed("store_split", what, "Let .published and .staging be plain directories of the store.")


def _changed(path: Path, reason: str) -> StorageFailed:
    return StorageFailed("stage_changed", f"{path}: {reason}; something else changed the stage", "Start again: what is good there is kept.")


def _complete(store: Path, request: ModelRequest, stage: Path, contents: Contents, tell: Tell) -> None:
    """Adds the files of ours, and puts everything on the disk; the manifest last, whose time says what was written to since (`published.sealed_ns`)."""
    provenance.write(stage, request, contents)
    durable.settle(stage, store.stat(), tell)
    manifests.write(stage, contents)
    durable.settle_own(stage / manifests.FILE, store.stat())


def _place(store: Path, stage: Path, directory: Path, contents: Contents) -> None:
    if present(directory) and not is_real_directory(directory):
        retention.discard(store, directory)  # a link, say: nothing is written to where it leads
    if present(directory):
        _mend(stage, directory, contents)
        shutil.rmtree(stage)
    else:
        forget_damage(directory)  # of a version of this content that was removed since
        stage.rename(directory)
        durable.sync_directory(stage.parent)
    durable.sync_directory(directory.parent)


def _mend(stage: Path, directory: Path, contents: Contents) -> None:
    """The same content was published before: each file that is not the very same is replaced by one rename, the manifest
    last, and what the model does not have goes. Readers keep what they have open."""
    for path in list(durable.files(directory)):
        name = str(path.relative_to(directory))
        if name not in contents.files and name not in OWN_FILES:
            path.unlink()
    for name in contents.files:
        durable.replace(stage / name, directory / name)
    # The lock's file stays the one that it was: who uses the version has it locked.
    own = [provenance.FILE, manifests.FILE] if present(directory / USE_LOCK) else [USE_LOCK, provenance.FILE, manifests.FILE]
    for name in own:
        durable.replace(stage / name, directory / name)
    for path in durable.directories(directory):
        durable.sync_directory(path)
    forget_damage(directory)


def _link(store: Path, request: ModelRequest, directory: Path, tell: Tell) -> None:
    """The link that counts is durable before any other is touched."""
    links.swap(store, label(request), directory, tell)
    durable.sync_directory(store)
    if request.name:
        for name in (f"{request.name}.{hash12(request.identity)}", request.name):
            links.point(store, name, directory, tell)
        durable.sync_directory(store)
