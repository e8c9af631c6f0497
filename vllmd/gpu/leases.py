"""Leases: one instance to a GPU, so that two never load onto one by accident. A flock per GPU UUID below <runtime>/gpus/.

The supervisor holds it from right before the spawn until nothing of the engine is left; the kernel gives it back when the
supervisor dies. The engine does not inherit it. A MIG instance is leased by its own UUID, with a shared lock on its GPU.

The file's content names the holder for people. It lies in a directory of the service's user, so that it is read as
hostile: who holds the lock is what the kernel says (/proc/locks), the content only adds the instance's name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.config.paths import Paths
from vllmd.errors import PermissionMissing, TryLater
from vllmd.system import cgroupnames, procfs
from vllmd.system.files import storage_error
from vllmd.system.lockfile import open_lock

NAME = re.compile(r"(GPU|MIG)-[A-Za-z0-9][A-Za-z0-9/-]{0,90}", re.ASCII)
"""A UUID as NVML writes it; older MIG ones are MIG-GPU-<uuid>/1/0, whose slashes become '_' in the file's name."""
_INSTANCE = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}", re.ASCII)
_CONTENT_LIMIT = 16384


@dataclass(frozen=True, slots=True)
class Claim:
    """What is wanted of one GPU. `shared`: others that say so too may hold it at the same time."""

    uuid: str
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease. `instance` and `unit` are '' where they are not known."""

    pid: int
    instance: str = ""
    unit: str = ""
    shared: bool = False

    def __str__(self) -> str:
        who = f"instance {self.instance}" if self.instance else "another supervisor"
        return f"{who} (pid {self.pid}" + (f", {self.unit})" if self.unit else ")")


class Held(TryLater):
    """Another instance has the GPU. Its `holders` are named in the message."""

    def __init__(self, uuid: str, holders: tuple[Holder, ...], *, shared: bool) -> None:
        named = " and ".join(map(str, holders)) or "another process"
        what = f"{uuid} is in use by {named}"
        hint = "Give each instance GPUs of its own (`gpus: 1` takes a free one), or set `gpus_shared: true` in both."
        if shared and not any(each.shared for each in holders):
            hint = "That one does not share: set `gpus_shared: true` there too, and restart it."
        super().__init__("gpu_leased", what, hint)
        self.uuid = uuid
        self.holders = holders


class Leases:
    """Locks that are held, until `release` or the end of this process."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    @property
    def uuids(self) -> tuple[str, ...]:
        return tuple(self._fds)

    def add(self, uuid: str, fd: int) -> None:
        self._fds[uuid] = fd

    def release(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


def path_of(paths: Paths, uuid: str) -> Path:
    """The lock file of a GPU. ValueError for what is no UUID, and could be any path."""
    if not NAME.fullmatch(uuid):
        raise ValueError(f"{uuid[:100]!r} is no UUID of a GPU")
    return paths.gpus / uuid.replace("/", "_")


def take(paths: Paths, claims: Iterable[Claim], instance: str) -> Leases:
    """All of them, or none: in the order of their UUIDs, so that of two starts that want the same ones one gets all.
    Held; PermissionMissing `lease_refused` where a file is not safe to use; StorageFailed."""
    taken = Leases()
    try:
        for claim in _in_order(claims):
            taken.add(claim.uuid, _take_one(path_of(paths, claim.uuid), claim, instance))
    except BaseException:
        taken.release()
        raise
    return taken


def _in_order(claims: Iterable[Claim]) -> list[Claim]:
    """Each UUID once; an exclusive claim wins over a shared one."""
    found: dict[str, Claim] = {}
    for claim in sorted(claims, key=lambda each: each.uuid):
        if claim.uuid not in found or found[claim.uuid].shared:
            found[claim.uuid] = claim
    return list(found.values())


def _take_one(path: Path, claim: Claim, instance: str) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    except OSError as error:
        raise storage_error(error, f"make {path.parent}") from error
    fd = open_lock(path, lambda reason: _refused(path, reason), mode=0o644)
    try:
        is_alone = _lock(fd, fcntl.LOCK_EX)
        if not is_alone and not (claim.shared and _lock(fd, fcntl.LOCK_SH)):
            raise Held(claim.uuid, holders_of(fd), shared=claim.shared)
        _sign(fd, instance, is_alone=is_alone)
        if claim.shared and is_alone and not _lock(fd, fcntl.LOCK_SH):  # the kernel lets go for a moment when it converts
            raise Held(claim.uuid, holders_of(fd), shared=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise storage_error(error, "lock a GPU") from error
    return True


def _refused(path: Path, reason: str) -> PermissionMissing:
    bad = path if path.parent.is_dir() and not path.parent.is_symlink() else path.parent
    return PermissionMissing("lease_refused", f"the lease {path} is refused: {reason}", f"Remove {bad}, after you have seen who made it: `ls -ld {bad}`.")


def _sign(fd: int, instance: str, *, is_alone: bool) -> None:
    """A line for each holder; whoever is alone begins anew. A full disk costs the name, not the lease."""
    me = {"instance": instance, "pid": os.getpid(), "unit": cgroupnames.unit_of(procfs.cgroup(os.getpid()))}
    line = json.dumps(me).encode() + b"\n"
    with contextlib.suppress(OSError):
        if is_alone:
            os.ftruncate(fd, 0)
        end = os.fstat(fd).st_size
        if end < _CONTENT_LIMIT:
            os.pwrite(fd, line, end)


# -- who holds them


def holders(paths: Paths) -> Mapping[str, tuple[Holder, ...]]:
    """UUID -> holders, of every lease that is held now. Takes no lock, so that looking never refuses anybody's start."""
    found = {}
    table = _lock_table()
    try:
        folder = os.open(paths.gpus, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return {}
    try:
        for name in sorted(os.listdir(folder)):  # noqa: PTH208 - by descriptor
            if NAME.fullmatch(name.replace("_", "/")) and (fd := _open_to_read(name, folder)) >= 0:
                try:
                    if named := _named(fd, table):
                        found[name.replace("_", "/")] = named
                finally:
                    os.close(fd)
    finally:
        os.close(folder)
    return found


def holders_of(fd: int) -> tuple[Holder, ...]:
    return _named(fd, _lock_table())


def _open_to_read(name: str, folder: int) -> int:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return -1
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return -1


@dataclass(frozen=True, slots=True)
class _Row:
    """A flock that is held, as /proc/locks lists it."""

    pid: int
    device: tuple[int, int]
    inode: int
    shared: bool


def _lock_table() -> list[_Row]:
    with contextlib.suppress(OSError):
        return list(_rows(Path("/proc/locks").read_text(encoding="ascii", errors="replace")))
    return []


def _rows(text: str) -> Iterator[_Row]:
    """'5: FLOCK  ADVISORY  WRITE 4711 00:19:1234 0 EOF'; a line with '->' is somebody who waits."""
    for line in text.splitlines():
        words = line.split()
        if len(words) < 6 or words[1] != "FLOCK":
            continue
        with contextlib.suppress(ValueError):
            major, minor, inode = words[5].split(":")
            yield _Row(int(words[4]), (int(major, 16), int(minor, 16)), int(inode), words[3] == "READ")


def _named(fd: int, table: Iterable[_Row]) -> tuple[Holder, ...]:
    """The kernel's rows for this file, with the instance from the content where the pids agree. Some file systems (btrfs)
    show another device there: then the pid in the content must confirm the inode."""
    file = os.fstat(fd)
    device = (os.major(file.st_dev), os.minor(file.st_dev))
    names = _content(fd)
    found = {}
    for row in table:
        if row.inode == file.st_ino and (row.device == device or row.pid in names):
            unit = cgroupnames.unit_of(procfs.cgroup(row.pid))
            found[row.pid] = Holder(row.pid, names.get(row.pid, ""), unit, row.shared)
    return tuple(found.values())


def _content(fd: int) -> dict[int, str]:
    """pid -> instance. The latest line of a pid counts; what makes no sense is passed over."""
    found = {}
    with contextlib.suppress(OSError):
        for line in os.pread(fd, _CONTENT_LIMIT, 0).splitlines():
            record = _object(line)
            pid, name = record.get("pid"), record.get("instance")
            if type(pid) is int and isinstance(name, str) and _INSTANCE.fullmatch(name):
                found[pid] = name
    return found


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
