"""Ends of the engine's processes, told by the kernel at once: a pidfd for each of the family. Nothing goes by name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllmd.system import procfs
from vllmd.system.family import Family

WATCHED_MAX = 256
"""Descriptors are bounded; an engine that forks more than this is watched in part."""
SHARE = 1 / 400
"""Of a core, for looking who there is: without a cgroup that is a walk through all of /proc."""


@dataclass(frozen=True, slots=True)
class Dead:
    """`comm` as it was last seen: processes name themselves some time after they begin."""

    pid: int
    comm: str
    at: float

    def __str__(self) -> str:
        return f"{self.comm or 'a process'} (pid {self.pid})"


class Deaths:
    """`rescan` now and then; `on_death` is called in the loop. The main process is left to whoever waits for it."""

    def __init__(self, family: Family, main_pid: int, on_death: Callable[[Dead], None]) -> None:
        self._family = family
        self._main_pid = main_pid
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._watched: dict[int, tuple[int, str]] = {}
        self._not_before = 0.0

    def rescan(self) -> None:
        began = time.monotonic()
        if began < self._not_before:
            return
        for pid in self._family.pids():
            if pid in self._watched:
                descriptor, comm = self._watched[pid]
                found = procfs.stat(pid)
                self._watched[pid] = descriptor, found.comm if found and not found.is_dead else comm
            elif pid != self._main_pid and len(self._watched) < WATCHED_MAX:
                self._add(pid)
        now = time.monotonic()
        self._not_before = now + (now - began) / SHARE

    def _add(self, pid: int) -> None:
        with contextlib.suppress(OSError):  # gone already, or no descriptors left
            descriptor = os.pidfd_open(pid)
            found = procfs.stat(pid)
            if found is None or found.is_dead:
                os.close(descriptor)
                return
            self._watched[pid] = descriptor, found.comm
            self._loop.add_reader(descriptor, self._died, pid)

    def _died(self, pid: int) -> None:
        comm = self._watched[pid][1]
        self._drop(pid)
        self._on_death(Dead(pid, comm, time.monotonic()))

    def _drop(self, pid: int) -> None:
        descriptor, _ = self._watched.pop(pid)
        self._loop.remove_reader(descriptor)
        os.close(descriptor)

    def close(self) -> None:
        for pid in list(self._watched):
            self._drop(pid)
