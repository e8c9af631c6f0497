"""Who holds a shared lock on a model's directory, without disturbing anybody: for listings. Who removes something takes the
exclusive lock (models/retention), and keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllmd.models.store import USE_LOCK
from vllmd.system.lockfile import is_locked

_LOCKS = Path("/proc/locks")


@dataclass(frozen=True, slots=True)
class Flock:
    """`device` as /proc/locks writes it: major:minor in hex."""

    device: str
    inode: int
    pid: int


@dataclass(frozen=True, slots=True)
class Flocks:
    """The flocks of this host at one moment. A lock from another host or container is not among them."""

    by_inode: Mapping[int, tuple[Flock, ...]]

    @classmethod
    def read(cls, path: Path = _LOCKS) -> Flocks:
        """Without /proc there are none to see."""
        try:
            lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            return cls({})
        found: dict[int, tuple[Flock, ...]] = {}
        for lock in filter(None, map(_parsed, lines)):
            found[lock.inode] = (*found.get(lock.inode, ()), lock)
        return cls(found)

    def holders(self, path: Path, *, is_known_held: bool = False) -> frozenset[int]:
        """The processes that hold a lock on it. On btrfs and overlays /proc/locks has another device than stat: then the inode
        alone has to do, for what is known to be held."""
        try:
            status = path.stat()
        except OSError:
            return frozenset()
        locks = self.by_inode.get(status.st_ino, ())
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        exact = frozenset(lock.pid for lock in locks if lock.device == device)
        return exact or (frozenset(lock.pid for lock in locks) if is_known_held else exact)

    def users(self, directory: Path, *, is_known_held: bool = False) -> frozenset[int]:
        """Of those who serve what lies in the directory."""
        places = (directory, directory / USE_LOCK)
        return frozenset().union(*(self.holders(place, is_known_held=is_known_held) for place in places))


def _parsed(line: str) -> Flock | None:
    """`1: FLOCK  ADVISORY  READ 4242 fe:01:131 0 EOF`; who waits for one has `->` after the number."""
    words = line.split()
    if len(words) < 6 or words[1] != "FLOCK":
        return None
    device, _, inode = words[5].rpartition(":")
    return Flock(device, int(inode), int(words[4])) if inode.isdigit() and words[4].isdigit() else None


def is_held(directory: Path) -> bool:
    """Whether anybody uses the version (system/lockfile.is_locked)."""
    return any(is_locked(path) for path in (directory, directory / USE_LOCK))
