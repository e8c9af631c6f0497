"""Where processes sit that do not die: state, kernel function and kernel stack, for the message that nobody can do more.

Only files that do not touch the process's memory: /proc/PID/cmdline and environ wait for its memory map's lock, which a
process in a driver may hold for ever. `stack` is root's to read, and waits for another lock: call this in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllmd.system import procfs

_FRAMES = 32
_NAMED = 8


@dataclass(frozen=True, slots=True)
class Stuck:
    """`where` is the kernel function that it waits in; `stack` the frames above it, where they may be read."""

    pid: int
    name: str = ""
    state: str = ""
    where: str = ""
    stack: tuple[str, ...] = ()

    def __str__(self) -> str:
        inside = ", ".join(filter(None, (f"state {self.state}" if self.state else "", f"in {self.where}" if self.where else "")))
        return " ".join(filter(None, (f"pid {self.pid}", self.name, f"({inside})" if inside else "")))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def look(pids: Iterable[int]) -> tuple[Stuck, ...]:
    """Those that are still there."""
    return tuple(found for pid in pids if (found := _look(pid)) is not None)


def _look(pid: int) -> Stuck | None:
    stat = procfs.stat(pid)
    if stat is None or stat.is_dead:
        return None
    frames = tuple(line.partition("] ")[2].partition("+")[0] or line for line in _read(pid, "stack").splitlines()[:_FRAMES])
    where = _read(pid, "wchan").strip("0\n") or (frames[0] if frames else "")
    return Stuck(pid, stat.comm if stat.comm.isprintable() else "", stat.state, where, frames)


def _read(pid: int, name: str) -> str:
    try:
        with Path(f"/proc/{pid}/{name}").open("rb") as file:
            return file.read(1 << 14).decode(errors="replace")
    except OSError:
        return ""


def describe(found: Iterable[Stuck]) -> str:
    """For one line: the first few by name."""
    found = tuple(found)
    return "; ".join(map(str, found[:_NAMED])) + (f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
