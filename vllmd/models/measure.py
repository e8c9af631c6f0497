"""How much of the disk a directory takes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Measure:
    """Regular files only, each once however many names it has. `linked`: (device, inode) -> size of those that have names
    elsewhere too. `newest` is when one was last written, in seconds since 1970. `unread`: directories that may not be looked into."""

    files: int = 0
    bytes: int = 0
    linked: Mapping[tuple[int, int], int] = field(default_factory=dict)
    newest: float = 0.0
    unread: int = 0

    @property
    def own_bytes(self) -> int:
        """What the removal of the directory gives back."""
        return self.bytes - sum(self.linked.values())


def measured(directory: Path) -> Measure:
    """Links are not followed. What vanishes meanwhile does not count. OSError where the directory itself cannot be read."""
    sizes: dict[tuple[int, int], int] = {}
    names: dict[tuple[int, int], int] = {}
    newest, unread = os.lstat(directory).st_mtime, 0
    waiting = [os.fspath(directory)]
    while waiting:
        path = waiting.pop()
        try:
            for status in _files(path, waiting):
                inode = (status.st_dev, status.st_ino)
                sizes[inode] = status.st_size
                names[inode] = names.get(inode, status.st_nlink) - 1
                newest = max(newest, status.st_mtime)
        except FileNotFoundError:
            continue
        except PermissionError:
            if path == os.fspath(directory):
                raise
            unread += 1
    linked = {inode: sizes[inode] for inode, others in names.items() if others > 0}
    return Measure(len(sizes), sum(sizes.values()), linked, newest, unread)


def _files(directory: str, found: list[str]) -> Iterator[os.stat_result]:
    """Of the regular files in it; its directories go into `found`."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found.append(entry.path)
                continue
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                yield status
