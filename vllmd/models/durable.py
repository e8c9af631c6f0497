"""Trees of files put on the disk: what a power cut must not take away again.

A file's bytes are on the disk after its fsync, its name after that of its directory, and a directory's name after that of
the one above.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllmd.models.inventory import OWN_FILES

FILE_MODE = 0o444
"""Versions share files by hard link: who writes into one of them changes several models. To remove a file takes w on its
directory only, so the service still can."""
OWN_FILE_MODE = 0o644
DIRECTORY_MODE = 0o755
"""Not read-only: to move a directory to another parent, which is how a version is removed, takes w on itself too."""
THREADS = 8
BATCH = 64
SAY_AGAIN_S = 10.0


def files(directory: Path) -> Iterator[Path]:
    """Everything below `directory` that is no directory, links as they are. OSError."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from files(Path(entry.path))
            else:
                yield Path(entry.path)


def settle(directory: Path, owner: os.stat_result, tell: Callable[[str], None]) -> None:
    """Modes, owner (where root does it) and everything on the disk, bottom up. OSError."""
    names = list(files(directory))
    told = time.monotonic()
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        for begin in range(0, len(names), BATCH):
            if time.monotonic() - told >= SAY_AGAIN_S:
                told = time.monotonic()
                tell(f"{begin} of {len(names)} files are on the disk")
            list(pool.map(lambda path: _settle_file(path, owner, _mode(directory, path)), names[begin : begin + BATCH]))
    for path in directories(directory):
        _settle_directory(path, owner)


def settle_own(path: Path, owner: os.stat_result) -> None:
    """The same for one file of ours, and the directory that it is in. OSError."""
    _settle_file(path, owner, OWN_FILE_MODE)
    sync_directory(path.parent)


def _mode(directory: Path, path: Path) -> int:
    return OWN_FILE_MODE if path.parent == directory and path.name in OWN_FILES else FILE_MODE


def directories(directory: Path) -> list[Path]:
    """`directory` and all below it, the deepest first."""
    return [Path(path) for path, _, _ in os.walk(directory, topdown=False)]


def _settle_file(path: Path, owner: os.stat_result, mode: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        _own(fd, status, owner, mode)
        if status.st_nlink == 1:  # else a published version has it too, and it has been on the disk since then
            os.fsync(fd)
    finally:
        os.close(fd)


def _settle_directory(path: Path, owner: os.stat_result) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _own(fd, os.fstat(fd), owner, DIRECTORY_MODE)
        os.fsync(fd)
    finally:
        os.close(fd)


def _own(fd: int, status: os.stat_result, owner: os.stat_result, mode: int) -> None:
    if os.geteuid() == 0 and (status.st_uid, status.st_gid) != (owner.st_uid, owner.st_gid):
        os.fchown(fd, owner.st_uid, owner.st_gid)
    if stat.S_IMODE(status.st_mode) != mode:
        os.fchmod(fd, mode)


def sync_directory(path: Path) -> None:
    """The names in it are on the disk afterwards. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(source: Path, target: Path) -> None:
    """Move a file over another, or make it anew. Both names may be of the very same file: then rename(2) does nothing and
    succeeds. What else has the target's name goes. OSError."""
    make_directories(target.parent, source.parent)
    try:
        source.replace(target)
    except IsADirectoryError:
        shutil.rmtree(target)
        source.replace(target)


def make_directories(path: Path, like: Path) -> None:
    """`path` and what it lacks above, with the owner of `like`. OSError."""
    if path.is_dir():
        return
    make_directories(path.parent, like)
    path.mkdir(mode=DIRECTORY_MODE)
    owner = like.stat()
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
