"""Facts about processes, read from /proc. A process may be gone at any time: then the answer is None or empty.

Numbers come from one place each: `Stat.start_time` (clock ticks since boot) together with a boot id and a pid names a
process for ever, where a pid alone is used again.
"""

# ruff: noqa: PTH115, PTH208 (Path objects cost more than the system calls here, thousands of times a walk)
from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_READ_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Stat:
    """/proc/PID/stat, as far as it is used. `state` is the kernel's letter (Z: dead, not reaped yet)."""

    pid: int
    comm: str
    state: str
    ppid: int
    pgid: int
    session: int
    start_time: int

    @property
    def is_dead(self) -> bool:
        return self.state in "ZXx"


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        parts = []
        left = _READ_LIMIT
        while left > 0 and (part := os.read(fd, min(left, 1 << 16))):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(fd)


def pids() -> list[int]:
    """Every process that /proc shows us. OSError where there is no /proc."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def stat(pid: int) -> Stat | None:
    """comm may hold spaces and brackets: the fields begin after the *last* bracket."""
    text = _read(f"/proc/{pid}/stat").decode(errors="replace")
    head, bracket, rest = text.rpartition(")")
    fields = rest.split()
    if not bracket or len(fields) < 20:
        return None
    return Stat(pid, head.partition("(")[2], fields[0], int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def snapshot() -> dict[int, Stat]:
    return {pid: found for pid in pids() if (found := stat(pid)) is not None}


def cmdline(pid: int) -> tuple[str, ...]:
    """Its argv; a process that wrote a title over it (setproctitle) shows one long argument."""
    text = _read(f"/proc/{pid}/cmdline").rstrip(b"\0").decode(errors="replace")
    return tuple(text.split("\0")) if text else ()


def variable(pid: int, name: str) -> str:
    """An environment variable as it stood at the process's exec; '' where it may not be read."""
    start = name.encode() + b"="
    for entry in _read(f"/proc/{pid}/environ").split(b"\0"):
        if entry.startswith(start):
            return entry[len(start) :].decode(errors="replace")
    return ""


def exe(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def uid(pid: int) -> int | None:
    """Its effective user, from status: the owner of /proc/PID is root for a process that is not dumpable."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"Uid:"):
            return int(line.split()[2])
    return None


def cgroup(pid: int) -> str:
    """Its path in the unified hierarchy ('/' the root, '' unknown)."""
    for line in _read(f"/proc/{pid}/cgroup").decode(errors="replace").splitlines():
        if line.startswith("0::"):
            return line[3:].removesuffix(" (deleted)")
    return ""


def boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def ancestors(pid: int) -> list[int]:
    """The process's parents, nearest first, pid 1 included."""
    found: list[int] = []
    step = stat(pid)
    while step is not None and step.ppid > 0 and step.ppid not in found:
        found.append(step.ppid)
        step = stat(step.ppid)
    return found


def socket_holders(inodes: Collection[int], among: Iterable[int]) -> dict[int, list[int]]:
    """inode -> pids, among these processes, that have the socket open. Processes we may not look into are passed over."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, list[int]] = {inode: [] for inode in inodes}
    for pid in among:
        for target in _descriptors(pid):
            inode = wanted.get(target)
            if inode is not None and pid not in found[inode]:
                found[inode].append(pid)
    return found


def _descriptors(pid: int) -> list[str]:
    folder = f"/proc/{pid}/fd"
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"{folder}/{name}"))
    return found


def sockets_of(pid: int) -> dict[int, int]:
    """fd -> inode of each socket that the process holds."""
    found = {}
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                target = os.readlink(f"{folder}/{name}")
                if target.startswith("socket:["):
                    found[int(name)] = int(target[8:-1])
    return found
