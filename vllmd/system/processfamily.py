"""The family without a cgroup of its own: in a container, in a shell. It says so, since it is the weaker way.

The supervisor becomes a subreaper, so that what forks out of the engine's tree is adopted by it and can be reaped; the
engine's direct child is bound to its life by PDEATHSIG (process.py). Workers that outlive a killed supervisor are ended
by the next one, from launch.json (launch.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Mapping

from vllmd.system.family import LAUNCH_VARIABLE, SWEEP_TIMEOUT_S, Leftover, Socket, holds_socket
from vllmd.system.host import Deadline, ProcessStat, all_processes, cpu_seconds, ticks_now
from vllmd.system.members import Members

PR_SET_CHILD_SUBREAPER = 36
_ROUND_S = 0.02
_CPU_CACHE_S = 0.5
_SETTLED_S = 1.0
"""A zombie of ours older than this is nobody's: those who wait for their children have done so by then."""


def become_subreaper() -> None:
    """Orphans of our descendants become our children. OSError where the kernel refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class ProcessFamily:
    """`reason`: why there is no cgroup. The first process is known by its environment from the start of the launcher on."""

    cgroup_dir = ""
    cgroup_path = ""

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self._members: Members | None = None
        self._killing = False
        self._cpu = (0.0, 0.0)
        self._zombies: dict[tuple[int, int], float] = {}
        with contextlib.suppress(OSError):
            become_subreaper()

    def describe(self) -> str:
        return f"processes found by environment, session and parent ({self._reason})"

    def environment(self, launch_id: str) -> Mapping[str, str]:
        return {LAUNCH_VARIABLE: launch_id}

    def prepare(self, launch_id: str) -> None:
        self._members = Members(launch_id, os.geteuid(), start_time=ticks_now() - 1, adopter=os.getpid())
        self._killing = False
        self._cpu = (0.0, 0.0)

    def began(self, pid: int, start_time: int) -> None:
        """The launch's first process: its session and its descendants count from now on."""
        if self._members is not None:
            self._members.pid, self._members.start_time = pid, start_time

    def pids(self) -> tuple[int, ...]:
        return () if self._members is None else tuple(each.pid for each in self._find())

    def contains(self, listener: Socket) -> bool:
        pids = self.pids()
        return bool(set(listener.pids) & set(pids)) or holds_socket(pids, listener.inode)

    def cpu_s(self) -> float:
        now = time.monotonic()
        if now - self._cpu[0] > _CPU_CACHE_S:
            # a member that has ended takes its share along: the sum must not go back
            self._cpu = (now, max(self._cpu[1], sum(map(cpu_seconds, self.pids()))))
        return self._cpu[1]

    def kill(self) -> None:
        self._killing = True
        if self._members is not None:
            self._find()
            self._members.kill()

    async def wait_empty(self, timeout_s: float) -> bool:
        deadline = Deadline(timeout_s)
        while True:
            self._reap_orphans()
            left = len(self._find()) if not self._killing or self._members is None else self._members.kill()
            if not left:
                return True
            if deadline.passed:
                return False
            await asyncio.sleep(min(_ROUND_S, deadline.remaining_s))

    def remove(self) -> bool:
        left = bool(self.pids())
        if not left:
            self._members = None
        return not left

    async def sweep(self, timeout_s: float = SWEEP_TIMEOUT_S) -> list[Leftover]:
        """Nothing is recorded in /proc: launch.recover ends what the last launch left."""
        del timeout_s
        return []

    def _find(self) -> list[ProcessStat]:
        members = self._members
        if members is None:
            return []
        found = members.find()
        if not members.pid and found:  # nobody told us (began): the one whose environment we made
            first = min(found, key=lambda each: each.start_time)
            if first.ppid == os.getpid():
                self.began(first.pid, first.start_time)
        return found

    def _reap_orphans(self) -> None:
        """Zombies among our children that nobody waits for. Those of asyncio and of process.Child are taken by their
        owners as soon as they die, so only what stays is ours to take."""
        now, me = time.monotonic(), os.getpid()
        seen = {(each.pid, each.start_time) for each in all_processes() if each.is_zombie and each.ppid == me}
        self._zombies = {key: self._zombies.get(key, now) for key in seen}
        for pid, _ in [key for key, since in self._zombies.items() if now - since > _SETTLED_S]:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
