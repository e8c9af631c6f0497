"""What is published: the versions, whether one is whole, and which of its files were found to be wrong.

A version that is wrong somewhere is marked beside it, STORE/.published/<label>/<manifest sha256>.damaged: it is not offered
until the files were fetched anew.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllmd.errors import ModelInvalid
from vllmd.models import contents as manifests
from vllmd.models.contents import Contents
from vllmd.models.inventory import OWN_FILES
from vllmd.models.places import is_real_directory, present
from vllmd.models.store import PUBLISHED, manifest_name
from vllmd.system.files import read_small, write_atomic

MAX_VERSIONS = 1000
"""What is looked into for files to share, and for damage that versions share."""
MARK_LIMIT_BYTES = 64 << 20


def directories(store: Path) -> list[Path]:
    """Every published version, whole or not. OSError."""
    homes = _subdirectories(store / PUBLISHED)
    return [path for home in homes for path in _subdirectories(home) if manifest_name(path)]


def _subdirectories(directory: Path) -> list[Path]:
    """Others may remove versions of other models meanwhile."""
    try:
        return sorted(path for path in directory.iterdir() if is_real_directory(path)) if is_real_directory(directory) else []
    except FileNotFoundError:
        return []


def versions(store: Path) -> Iterator[tuple[Path, Contents]]:
    """Those with a manifest that can be read. OSError."""
    for directory in directories(store)[:MAX_VERSIONS]:
        contents = manifest_of(directory)
        if contents is not None:
            yield directory, contents


def manifest_of(directory: Path) -> Contents | None:
    """None where it is missing, is damaged, or is not what the version's name says. OSError."""
    try:
        contents = manifests.read(directory)
    except (FileNotFoundError, NotADirectoryError, ModelInvalid):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EINVAL, errno.EFBIG):
            return None
        raise
    return contents if contents.sha256 == directory.name else None


def sealed_ns(directory: Path) -> int:
    """When a version was complete, in ns since the epoch. Its files were validated before that and are not written to after it: one
    whose times are older is as it was then. OSError."""
    return (directory / manifests.FILE).stat(follow_symlinks=False).st_mtime_ns


def fault(directory: Path, contents: Contents) -> str:
    """Why a version cannot be served, '' if it can. Reads names and sizes only. OSError."""
    wrong = sorted(damaged(directory))
    if wrong:
        return f"was found damaged ({_some(wrong)}): it is fetched anew by the next source that has it"
    there = _sizes(directory)
    missing = sorted(name for name, entry in contents.files.items() if there.get(name) != entry.size)
    if missing:
        return f"lacks what its manifest names, or has it in another size ({_some(missing)})"
    # A tool's notes (.nfs0001, .DS_Store) are not the model; anything else an engine might load.
    foreign = sorted(name for name in there.keys() - contents.files.keys() if name not in OWN_FILES and not name.startswith("."))
    return f"holds what its manifest does not name ({_some(foreign)}): remove that" if foreign else ""


def _sizes(directory: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):  # it is being removed: then files are missing
        _measure(directory, "", found)
    return found


def _measure(directory: Path, prefix: str, found: dict[str, int]) -> None:
    """Every start waits for this: no path is made for a file, and nothing imported that only writing needs."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _measure(Path(entry.path), f"{prefix}{entry.name}/", found)
            else:
                status = entry.stat(follow_symlinks=False)
                found[prefix + entry.name] = status.st_size if stat.S_ISREG(status.st_mode) else -1


def _some(names: list[str]) -> str:
    return names[0][:255] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def mark_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.damaged")


def damaged(directory: Path) -> frozenset[str]:
    """The files of a published version that were found to be wrong. A mark that cannot be understood speaks for all. OSError."""
    if not manifest_name(directory):
        return frozenset()
    try:
        names = json.loads(read_small(mark_of(directory), MARK_LIMIT_BYTES).decode("utf-8"))
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return frozenset(names)
    except FileNotFoundError:
        return frozenset()
    except (ValueError, RecursionError):
        pass
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EINVAL, errno.EFBIG):
            raise
    contents = manifest_of(directory)
    return frozenset(contents.files if contents is not None else {manifests.FILE})


def mark_damaged(directory: Path, names: Iterable[str]) -> None:
    """Remember that these files of a published version are wrong, in it and in every version that shares them. Nothing is
    remembered of any other directory. OSError."""
    wrong = frozenset(names)
    if not wrong or not manifest_name(directory):
        return
    from vllmd.models import durable

    _mark(directory, wrong)
    inodes = {_inode(directory / name) for name in wrong} - {None}
    for other in directories(directory.parent.parent.parent)[:MAX_VERSIONS]:
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            shared = frozenset(str(path.relative_to(other)) for path in durable.files(other) if _inode(path) in inodes)
            if other != directory and shared:
                _mark(other, shared)


def _mark(directory: Path, names: frozenset[str]) -> None:
    path, names = mark_of(directory), damaged(directory) | names
    _remove_directory(path)
    write_atomic(path, json.dumps(sorted(names)) + "\n")
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _inode(path: Path) -> tuple[int, int] | None:
    status = path.lstat() if present(path) else None
    return (status.st_dev, status.st_ino) if status is not None and status.st_nlink > 1 else None


def forget_removed(home: Path) -> None:
    """Marks of versions whose removal was interrupted. Needs the lock. OSError."""
    for path in home.glob("*.damaged"):
        if not present(path.with_suffix("")):
            _remove_directory(path)
            path.unlink(missing_ok=True)


def _remove_directory(path: Path) -> None:
    """Somebody's directory in the place of a mark would break the repair of the version for ever."""
    if is_real_directory(path):
        from shutil import rmtree

        rmtree(path)


def forget_damage(directory: Path) -> None:
    """Its files were replaced by good ones. OSError."""
    from vllmd.models import durable

    path = mark_of(directory)
    if present(path):
        _remove_directory(path)
        path.unlink(missing_ok=True)
        durable.sync_directory(path.parent)
