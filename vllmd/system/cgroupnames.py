"""From a cgroup id, as the kernel tells it of a socket, to a path, to the systemd unit that the path names.

The id is the inode number of the cgroup's directory. Root opens it by handle, in microseconds; others walk the tree.
"""

# ruff: noqa: PTH115, PTH116 (Path objects cost more than the system calls here, thousands of times a walk)
from __future__ import annotations

import ctypes
import functools
import os
import struct
from dataclasses import dataclass

_FILEID_KERNFS = 0xFE


@dataclass(frozen=True, slots=True)
class Mount:
    """Where the unified hierarchy is mounted: `point` the directory ('' nowhere), `root` the cgroup that it shows."""

    point: str
    root: str

    def directory(self, cgroup: str) -> str:
        """The directory of a cgroup path, '' when the mount does not show it."""
        if self.root != "/":
            if cgroup != self.root and not cgroup.startswith(self.root + "/"):
                return ""
            cgroup = cgroup[len(self.root) :]
        return self.point + cgroup.rstrip("/") if self.point else ""

    def path(self, directory: str) -> str:
        """The cgroup path of a directory under the mount."""
        if directory != self.point and not directory.startswith(self.point + "/"):
            return ""
        below = directory[len(self.point) :]
        return (self.root.rstrip("/") + below) or "/"


@functools.cache
def unified_mount() -> Mount:
    """The cgroup2 mount, the one that shows most where there are several. Mounts do not move while we run."""
    best = Mount("", "")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            if rest.startswith("cgroup2 "):
                root, point = fields.split()[3:5]
                if not best.point or len(root) < len(best.root):
                    best = Mount(point, root)
    return best


def path_of(cgroup_id: int) -> str:
    """The path in the unified hierarchy; '' when there is none that we can see (removed, another namespace)."""
    mount = unified_mount()
    if not cgroup_id or not mount.point:
        return ""
    try:
        return mount.path(_by_handle(mount.point, cgroup_id))
    except PermissionError:
        return mount.path(_by_walk(mount.point, cgroup_id))
    except OSError:
        return ""


def _by_handle(point: str, cgroup_id: int) -> str:
    """open_by_handle_at(2) with a handle made by hand: kernfs's is the id alone. Needs CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = ctypes.create_string_buffer(struct.pack("=IiQ", 8, _FILEID_KERNFS, cgroup_id))
    where = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = libc.open_by_handle_at(where, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        code = ctypes.get_errno()
    finally:
        os.close(where)
    if fd < 0:
        raise OSError(code, os.strerror(code))
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _by_walk(point: str, cgroup_id: int) -> str:
    if os.stat(point).st_ino == cgroup_id:
        return point
    pending = [point]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.inode() == cgroup_id:
                            return entry.path
                        pending.append(entry.path)
        except OSError:
            continue
    return ""


def members(cgroup: str) -> list[int]:
    """The processes in the cgroup and below it; [] where it cannot be read."""
    top = unified_mount().directory(cgroup)
    found: list[int] = []
    for folder, _, _ in os.walk(top) if top else ():
        try:
            with open(f"{folder}/cgroup.procs", encoding="utf-8") as lines:
                found += [int(line) for line in lines]
        except OSError:
            continue
    return found


_UNIT_SUFFIXES = (".service", ".scope", ".socket", ".mount", ".swap")


def unit_of(cgroup: str) -> str:
    """The unit that a path names, '' for none. The first below the slices: what lies deeper is the unit's own (a
    container's nginx.service is not ours to stop); only below a user manager it is the user's unit that counts."""
    found = ""
    for part in cgroup.split("/"):
        name = part.removeprefix("_")
        if name.endswith(_UNIT_SUFFIXES) and name.isprintable():
            found = name
            if not name.startswith("user@"):
                break
    return found


def is_user_unit(cgroup: str) -> bool:
    """Whether the unit belongs to a user's own manager, so that it is stopped by `systemctl --user`."""
    return "/user@" in cgroup and not unit_of(cgroup).startswith("user@")


def is_login(cgroup: str) -> bool:
    """Whether it is a login session, a terminal or the like: a scope that nobody manages as a service."""
    return cgroup.startswith("/user.slice/") and unit_of(cgroup).endswith(".scope")


def is_instance(cgroup: str) -> bool:
    """Whether it lies in an instance of vllmd, which nothing but its own supervisor may touch."""
    return any(part.startswith("vllmd@") and part.endswith(".service") for part in cgroup.split("/"))
