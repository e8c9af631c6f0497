"""Who uses a model of the store: instances by name, anything else by its process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllmd.config.paths import Paths
from vllmd.ctl import files
from vllmd.models.catalog import Item
from vllmd.models.inuse import Flocks

ANOTHER = "another process"


@dataclass(frozen=True, slots=True)
class Users:
    """`serving`: real directory -> instances whose supervisor lives and says that it serves it. `supervisors`: pid -> instance."""

    flocks: Flocks
    serving: Mapping[str, tuple[str, ...]]
    supervisors: Mapping[int, str]

    @classmethod
    def look(cls, paths: Paths) -> Users:
        flocks = Flocks.read()
        serving: dict[str, tuple[str, ...]] = {}
        supervisors: dict[int, str] = {}
        for runtime in sorted(paths.runtime.glob("i/*")):
            pids = flocks.holders(runtime / "lock")
            supervisors |= dict.fromkeys(pids, runtime.name)
            directory = files.text(files.status(paths, runtime.name), "model", "directory") if pids else ""
            if directory:
                real = os.path.realpath(directory)
                serving[real] = (*serving.get(real, ()), runtime.name)
        return cls(flocks, serving, supervisors)

    def of(self, item: Item) -> tuple[str, ...]:
        """Names of instances first; () where nobody uses it."""
        instances = [name for each in item.held_at for name in self.serving.get(os.path.realpath(each), ())]
        users = (self.flocks.users(each, is_known_held=item.is_held) for each in item.held_at)
        pids = sorted(frozenset().union(*users) - {os.getpid()})
        named = {pid: self.supervisors.get(pid) or self.supervisors.get(_parent(pid), "") for pid in pids}
        instances += [name for name in named.values() if name]
        others = [f"{_command(pid)} (pid {pid})" for pid, name in named.items() if not name]
        found = tuple(dict.fromkeys((*instances, *others)))
        return found or ((ANOTHER,) if item.is_held else ())


def _parent(pid: int) -> int:
    """The resolve stage is a child of its supervisor. 0 where that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[1])
    except (OSError, ValueError, IndexError):
        return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "a process"
