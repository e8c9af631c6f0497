"""Directories, secrets, locks and disks: who owns them, and what is left on them. Links are not followed: below the state
directory everything may be of the service's making, and root reads it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from vllmd.config.paths import Paths
from vllmd.ctl.doctor.facts import Disk, HeldLock, Place, PlaceFacts
from vllmd.instance.keys import CREDENTIALS, FILE
from vllmd.models.inuse import Flocks
from vllmd.system import cgroupnames, procfs

CREDSTORES = (Path("/etc/credstore"), Path("/run/credstore"))
CREDENTIAL_PREFIX = "vllmd."
_LOCKS = 4096
_SECRETS = 1024


def place(path: Path) -> Place:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return Place(str(path))
    except OSError as error:
        return Place(str(path), error=error.strerror or str(error))
    kinds = ((stat.S_ISDIR, "directory"), (stat.S_ISREG, "file"), (stat.S_ISLNK, "link"))
    kind = next((word for is_it, word in kinds if is_it(found.st_mode)), "other")
    return Place(str(path), kind, found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_nlink, found.st_size)


def look(paths: Paths) -> PlaceFacts:
    locks = [(place(folder), each) for folder in (paths.locks, paths.gpus) for each in _inside(folder)]
    return PlaceFacts(
        folders=tuple(map(place, folders(paths))),
        keys=tuple(place(each / FILE) for each in _directories(paths.state / "instances")),
        credentials=tuple(_credentials()) if paths.scope == "system" else (),
        published=tuple(place(each / CREDENTIALS) for each in _directories(paths.state / "public")),
        engines=tuple(map(place, (paths.engines, *_directories(paths.engines)))),
        locks=tuple((place(each), folder) for folder, each in locks),
        held=tuple(_held(paths, [each for _, each in locks])),
    )


def folders(paths: Paths) -> tuple[Path, ...]:
    below = (paths.runtime, paths.gpus, paths.locks, paths.sockets, paths.runtime / "i")
    state = (paths.state, paths.models, paths.state / "instances", paths.state / "public", paths.state / "gpus")
    return (paths.config, *below, *state, *_directories(paths.state / "instances"), paths.cache)


def _directories(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(Path(each.path) for each in found if each.is_dir(follow_symlinks=False) and not each.name.startswith("."))[:_SECRETS]
    except OSError:
        return []


def _inside(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(Path(each.path) for each in found)[:_LOCKS]
    except OSError:
        return []


def _credentials() -> Iterable[Place]:
    for folder in CREDSTORES:
        yield from (place(each) for each in _inside(folder) if each.name.startswith(CREDENTIAL_PREFIX))


def supervisors(paths: Paths, flocks: Flocks) -> dict[int, str]:
    """Instances that run, in a unit or by hand: pid -> name."""
    return {pid: folder.name for folder in _directories(paths.runtime / "i") for pid in flocks.holders(folder / "lock")}


def _held(paths: Paths, locks: list[Path]) -> Iterable[HeldLock]:
    """By others than instances."""
    flocks = Flocks.read()
    ours = supervisors(paths, flocks)
    for path in locks:
        for pid in sorted(flocks.holders(path) - ours.keys()):
            known = procfs.stat(pid)
            if known is not None:
                yield HeldLock(str(path), pid, known.comm, cgroupnames.unit_of(procfs.cgroup(pid)))


def disk(role: str, path: Path) -> Disk | None:
    """Of the directory, or of the nearest one above it; None where there is none to look at."""
    for each in (path, *path.parents):
        try:
            found = os.statvfs(each)
            device = each.stat().st_dev
        except (FileNotFoundError, NotADirectoryError):
            continue
        return Disk(
            role, str(path), device, found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize,
            found.f_favail, found.f_files, bool(found.f_flag & os.ST_RDONLY), _mount_of(each),
        )  # fmt: skip
    return None


def _mount_of(path: Path) -> str:
    return str(next((each for each in (path, *path.parents) if os.path.ismount(each)), Path("/")))
