"""Finding and ending a launch's processes without a cgroup: by launch id, session and parent, then by pidfd.

A process belongs to a launch when its environment carries the launch's id, when it is in the session of the launch's
first process, or when it descends from such a one, or was seen to; never when it is older than the launch, or in our own
session. A daemon that leaves all of these and cleans its environment too is found by having been adopted by the subreaper.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllmd.system.family import LAUNCH_VARIABLE
from vllmd.system.host import ProcessStat, all_processes, process_stat

_ENVIRON_MAX = 1 << 20


@dataclass(slots=True)
class Members:
    """One launch. `pid` 0 while its first process is unknown; `adopter` the subreaper's pid (0: none)."""

    launch_id: str
    uid: int
    pid: int = 0
    start_time: int = 0
    adopter: int = 0
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def find(self) -> list[ProcessStat]:
        """The living ones, a snapshot; the launch's first process first."""
        ours = os.getsid(0)
        young = [each for each in all_processes() if each.start_time >= self.start_time and each.session != ours]
        # the kernel gives no pid out again that still names a session: then our session has no member left
        reused = any(each.pid == self.pid and each.start_time != self.start_time for each in young)
        session = 0 if reused else self.pid
        found = {each.pid: each for each in young if self._is_root(each, session)}
        _add_descendants(found, young)
        self._seen = {(each.pid, each.start_time) for each in found.values()}
        living = [each for each in found.values() if not each.is_zombie]
        return sorted(living, key=lambda each: (each.pid != self.pid, each.start_time))

    def kill(self) -> int:
        """One round of SIGKILL; returns how many there were. What forks meanwhile is met in the next round."""
        found = self.find()
        for each in found:
            kill_exactly(each)
        return len(found)

    def _is_root(self, stat: ProcessStat, session: int) -> bool:
        """Belongs by itself, not by its parent."""
        if (stat.pid, stat.start_time) in self._seen:
            return True
        if _owner(stat.pid) != self.uid:
            return False
        return (bool(session) and stat.session == session) or self._is_orphan(stat) or _launch_id(stat.pid) == self.launch_id

    def _is_orphan(self, stat: ProcessStat) -> bool:
        """Adopted: our own children lead their session, or stay in ours; a daemon does neither."""
        return bool(self.adopter and self.start_time) and stat.ppid == self.adopter and stat.session != stat.pid


def _add_descendants(found: dict[int, ProcessStat], processes: Iterable[ProcessStat]) -> None:
    children: dict[int, list[ProcessStat]] = {}
    for each in processes:
        children.setdefault(each.ppid, []).append(each)
    pending = list(found)
    while pending:
        for child in children.get(pending.pop(), ()):
            if child.pid not in found:
                found[child.pid] = child
                pending.append(child.pid)


def _owner(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116 - thousands of times a look
    except OSError:
        return -1


def _launch_id(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environ = b"\0" + file.read(_ENVIRON_MAX)
    except OSError:
        return ""
    _, found, rest = environ.partition(b"\0" + LAUNCH_VARIABLE.encode() + b"=")
    return rest.partition(b"\0")[0].decode(errors="replace") if found else ""


def kill_exactly(stat: ProcessStat) -> None:
    """SIGKILL to this very process: the pidfd is opened first and the start time compared after, so that a pid that was
    given to somebody else meanwhile is never hit."""
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(stat.pid)
        try:
            now = process_stat(stat.pid)
            if now is not None and now.start_time == stat.start_time:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
