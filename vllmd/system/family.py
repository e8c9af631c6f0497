"""The engine's family: all processes of one launch, whatever they rename themselves to or fork into.

Two ways to hold it, one interface: a cgroup of its own (cgroup.py), or what /proc tells (processfamily.py) where no cgroup is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LAUNCH_VARIABLE = "VLLMD_LAUNCH_ID"
SWEEP_TIMEOUT_S = 15.0


class Socket(Protocol):
    """What is known of a listening socket (preflight.report.Listener)."""

    @property
    def inode(self) -> int: ...
    @property
    def pids(self) -> tuple[int, ...]: ...
    @property
    def cgroup(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Leftover:
    """What an earlier launch had left. `gone` False: killed, and still there (a process that cannot be killed)."""

    launch_id: str
    pids: tuple[int, ...]
    gone: bool

    def __str__(self) -> str:
        count = f"{len(self.pids)} process{'' if len(self.pids) == 1 else 'es'}"
        named = ", ".join(map(str, self.pids[:8])) + (", ..." if len(self.pids) > 8 else "")
        return f"{count} of launch {self.launch_id}" + (f" ({named})" if named else "") + ("" if self.gone else ", which cannot be killed")


class Family(Protocol):
    """One launch at a time. Nothing here raises for a process that is gone already."""

    @property
    def cgroup_dir(self) -> str:
        """The directory that the engine's first process enters; '' before prepare(), and without a cgroup."""

    @property
    def cgroup_path(self) -> str:
        """The same as the kernel names it ('/system.slice/vllmd@x.service/engine-1'), for the launch record; '' likewise."""

    def describe(self) -> str:
        """For people: by what the family is held."""

    def environment(self, launch_id: str) -> Mapping[str, str]:
        """What the engine's environment must hold."""

    def prepare(self, launch_id: str) -> None:
        """Before the spawn. PermissionMissing, StorageFailed."""

    def pids(self) -> tuple[int, ...]:
        """The living members."""

    def contains(self, listener: Socket) -> bool:
        """Whether one of the family holds the socket."""

    def cpu_s(self) -> float:
        """CPU time used so far, in seconds."""

    def kill(self) -> None:
        """SIGKILL to all, at once; wait_empty() goes on with it where that takes several rounds."""

    async def wait_empty(self, timeout_s: float) -> bool:
        """True when nobody is left."""

    def remove(self) -> bool:
        """Forget the launch, and take its traces away; False while something is left in it."""

    async def sweep(self, timeout_s: float = SWEEP_TIMEOUT_S) -> list[Leftover]:
        """End what earlier launches of this instance left here: our own, and nothing else."""


def holds_socket(pids: Iterable[int], inode: int) -> bool:
    """Whether one of these processes has the socket open; False for those that we may not look into."""
    wanted = f"socket:[{inode}]"
    return bool(inode) and any(wanted in _descriptors(pid) for pid in pids)


def _descriptors(pid: int) -> list[str]:
    found = []
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            try:
                found.append(str(path.readlink()))
            except OSError:
                continue
    except OSError:
        pass
    return found
