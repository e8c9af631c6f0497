"""Removes what is no published version: hub caches, unfinished downloads, and what nothing speaks for any more.

As with versions (models/retention) it is first renamed, under the locks that keep others off, and then deleted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from vllmd.models import leftovers, manifest, retention
from vllmd.models.catalog import Item, homes
from vllmd.models.identity import hash12
from vllmd.models.ioerrors import explained
from vllmd.models.measure import measured
from vllmd.models.places import is_directory, is_real_directory, present
from vllmd.models.retention import TRASH, InUse, Removed
from vllmd.system.files import read_small

LEFT = ".removed."
"""Beside what was removed, where the trash of the store is on another file system."""
_MARK = ".damaged"


def remove_hub(store: Path, item: Item) -> Removed | InUse:
    """A model of a hub cache, with all its snapshots, unless one is in use. StorageFailed, PermissionMissing."""
    with explained(f"remove {item.directory}"), ExitStack() as stack:
        problem = retention.lock_label(store, f"{item.name}.{hash12(item.identity)}", stack)
        for snapshot in item.snapshots:
            problem = problem or stack.enter_context(retention.unused(snapshot))
        if problem:
            return InUse(item.directory, problem)
        freed, doomed = measured(item.directory).own_bytes, _aside(store, item.directory)
        stack.close()
        shutil.rmtree(doomed)
        return Removed(item.directory, freed)


def _aside(store: Path, directory: Path) -> Path:
    try:
        return retention.discard(store, directory)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    return directory.rename(directory.with_name(f"{LEFT}{os.urandom(8).hex()}"))


def remove_unfinished(store: Path, item: Item) -> Removed | InUse:
    """What a download or an import left, and its log, unless it runs. StorageFailed, PermissionMissing."""
    paths = (item.directory, item.directory.with_name(f"{item.name}.log"))
    return leftovers.remove_stage(store, leftovers.Stale(item.name, paths, item.size.own_bytes, 0.0))


def remove_home(store: Path, home: Path) -> bool:
    """STORE/.published/<label> without a version. False where it is being worked on. OSError, PermissionMissing."""
    with ExitStack() as stack:
        if retention.lock_label(store, home.name, stack) or not _is_bare(home):
            return False
        for path in list(home.iterdir()):
            path.unlink()
        home.rmdir()
    return True


def bare_homes(store: Path) -> list[Path]:
    """OSError."""
    return [home for home in homes(store) if _is_bare(home)]


def _is_bare(home: Path) -> bool:
    return all(path.name.endswith(_MARK) and not is_real_directory(path) for path in home.iterdir())


def orphans(store: Path) -> list[Path]:
    """Marks of damage of versions that are gone, and manifests of directories that are no more. OSError."""
    marks = (path for home in homes(store) for path in sorted(home.glob(f"*{_MARK}")))
    gone = [path for path in marks if not present(path.with_name(path.name.removesuffix(_MARK)))]
    above = store / manifest.DIRECTORY
    found = sorted(above.glob("*.json")) if is_real_directory(above) else []
    return gone + [path for path in found if _is_orphan(path)]


def _is_orphan(path: Path) -> bool:
    """One that cannot be understood stays: it is made anew when it is needed."""
    try:
        directory = json.loads(read_small(path, manifest.LIMIT_BYTES).decode("utf-8"))["directory"]
        return isinstance(directory, str) and directory.startswith("/") and not is_directory(Path(directory))
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        return False


def rubbish(store: Path) -> list[Path]:
    """What removals that were interrupted left. OSError."""
    places = ((store / TRASH, "*"), (store / "hub", f"{LEFT}*"))
    return sorted(path for place, pattern in places if is_real_directory(place) for path in place.glob(pattern))


def delete(path: Path) -> int:
    """The bytes that it gives back. OSError where it stays."""
    if not is_real_directory(path):
        size = path.lstat().st_size
        path.unlink()
        return size
    size = measured(path).own_bytes
    shutil.rmtree(path)
    return size
