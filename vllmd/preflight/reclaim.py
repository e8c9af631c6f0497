"""Ending what holds a port: the whole tree, or the whole cgroup of its launch, and nothing else.

vLLM's workers outlive a killed API server with the GPU's memory (vllm#55510), rename themselves, and may have left the
tree: so the family is the tree, the launch's cgroup, and whoever carries its launch id, looked up again before SIGKILL.
Each process is held by a pidfd, checked against its start time, so that a pid used again is never hit.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from vllmd.preflight.attribution import LAUNCH_VARIABLE, facts, facts_of
from vllmd.preflight.claims import LaunchRecord, Me, is_launch_cgroup, is_of
from vllmd.preflight.owner import OwnerRules, ProcessFacts, is_engine
from vllmd.system import cgroupnames, procfs
from vllmd.system.procfs import Stat

_KILL_S = 5.0
"""How long killed processes may take to disappear; one in a driver's D state takes for ever."""
_ROUND_S = 0.2


@dataclass(slots=True)
class Family:
    """Everything that is to end. Grows as it is looked up again; `seen` is pid -> start time of each member so far."""

    roots: tuple[ProcessFacts, ...]
    untouchable: frozenset[int]
    seen: dict[int, int] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    """pid -> pidfd of the members that have not been seen to end."""

    @property
    def launch_ids(self) -> frozenset[str]:
        return frozenset(each.launch_id for each in self.roots if each.launch_id)

    @property
    def cgroups(self) -> frozenset[str]:
        return frozenset(found for each in self.roots if (found := launch_cgroup(each.cgroup)))


def launch_cgroup(cgroup: str) -> str:
    """The part of a path up to a launch's own cgroup, '' when it is in none."""
    while cgroup:
        if is_launch_cgroup(cgroup):
            return cgroup
        cgroup = cgroup.rpartition("/")[0]
    return ""


def topmost(root: ProcessFacts, rules: OwnerRules, untouchable: Collection[int]) -> ProcessFacts:
    """The highest ancestor that is an engine of the same user itself: with several API servers the listener is a child
    of the `vllm serve` that would start it again. A shell in between ends the climb."""
    top = root
    while top.ppid > 1 and top.ppid not in untouchable:
        parent = facts(top.ppid)
        if parent is None or parent.uid != root.uid or not is_engine(parent, rules):
            break
        top = parent
    return top


def stop(roots: Iterable[ProcessFacts], untouchable: frozenset[int], grace_s: float) -> tuple[list[int], list[int]]:
    """SIGTERM, grace, SIGKILL for the roots and their families; (ended, remaining) pids. Zombies count as ended.

    Takes at most grace_s + 5 s. PermissionError of single processes is not raised: they remain.
    """
    family = Family(tuple(roots), untouchable)
    try:
        for pid in _look_up(family):
            _send(family, pid, signal.SIGTERM)
        _wait(family, time.monotonic() + grace_s)
        _kill(family, time.monotonic() + _KILL_S)
        return sorted(set(family.seen) - set(family.held)), sorted(family.held)
    finally:
        for pidfd in family.held.values():
            os.close(pidfd)


def _kill(family: Family, deadline: float) -> None:
    """Again and again, since what we kill may fork until it is dead."""
    while True:
        survivors = [*_look_up(family), *family.held]
        if not survivors:
            return
        for cgroup in family.cgroups:
            _kill_cgroup(cgroup, family.untouchable)
        for pid in dict.fromkeys(survivors):
            _send(family, pid, signal.SIGKILL)
        _wait(family, min(deadline, time.monotonic() + _ROUND_S))
        if time.monotonic() >= deadline:
            return


def _kill_cgroup(cgroup: str, untouchable: frozenset[int]) -> None:
    folder = cgroupnames.unified_mount().directory(cgroup)
    if folder and not untouchable & set(cgroupnames.members(cgroup)):
        with contextlib.suppress(OSError), open(f"{folder}/cgroup.kill", "w", encoding="utf-8") as file:
            file.write("1")


def _look_up(family: Family) -> list[int]:
    """Members that were not known, children before their parents; they are held and counted as seen."""
    table = procfs.snapshot()
    found = [pid for pid in _members(family, table) if family.seen.get(pid) != table[pid].start_time]
    return [pid for pid in found if _hold(family, table[pid])]


def _members(family: Family, table: Mapping[int, Stat]) -> list[int]:
    known = family.seen or {each.pid: each.start_time for each in family.roots}
    tops = [pid for pid, start in known.items() if pid in table and table[pid].start_time == start]
    tops += [pid for cgroup in family.cgroups for pid in cgroupnames.members(cgroup) if pid in table]
    tops += [pid for pid in table if _carries(pid, family.launch_ids)]
    tops += [pid for pid, each in table.items() if _is_left_by(each, known)]
    found = post_order(tops, table)
    return [pid for pid in found if pid not in family.untouchable and not table[pid].is_dead]


def _carries(pid: int, launch_ids: frozenset[str]) -> bool:
    return bool(launch_ids) and procfs.variable(pid, LAUNCH_VARIABLE) in launch_ids


def _is_left_by(each: Stat, known: Mapping[int, int]) -> bool:
    """A renamed worker whose API server is gone, in a session or group that a member leads."""
    return each.comm.startswith("VLLM::") and (each.pgid in known or each.session in known)


def post_order(tops: Iterable[int], table: Mapping[int, Stat]) -> list[int]:
    """The processes and all their descendants, each once, children first."""
    children: dict[int, list[int]] = {}
    for each in table.values():
        children.setdefault(each.ppid, []).append(each.pid)
    found: dict[int, None] = {}
    pending = [(pid, False) for pid in dict.fromkeys(tops)]
    opened: set[int] = set()
    while pending:
        pid, is_done = pending.pop()
        if is_done:
            found[pid] = None
        elif pid not in opened:
            opened.add(pid)
            pending.append((pid, True))
            pending += [(child, False) for child in children.get(pid, ())]
    return list(found)


def _hold(family: Family, process: Stat) -> bool:
    """Open its pidfd, and only then see that it is still the same process."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return False
    now = procfs.stat(process.pid)
    if now is None or now.start_time != process.start_time or now.is_dead:
        os.close(pidfd)
        return False
    family.seen[process.pid] = process.start_time
    family.held[process.pid] = pidfd
    return True


def _send(family: Family, pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(family.held[pid], number)


def _wait(family: Family, deadline: float) -> None:
    """Until all that are held have ended, or the deadline. A pidfd becomes readable when its process is a zombie."""
    poller = select.poll()
    for pidfd in family.held.values():
        poller.register(pidfd, select.POLLIN)
    while family.held and (left := deadline - time.monotonic()) > 0:
        ready = {fd for fd, _ in poller.poll(left * 1000)}
        for pid in [pid for pid, pidfd in family.held.items() if pidfd in ready]:
            poller.unregister(family.held[pid])
            os.close(family.held.pop(pid))


def leftovers(launches: Iterable[LaunchRecord], me: Me) -> tuple[ProcessFacts, ...]:
    """What is alive of these launches although nobody listens any more: workers that outlived their API server. Never
    ourselves or our ancestors, never another user's, never a former boot's."""
    launches = [each for each in launches if each.boot_id == me.boot_id]
    if not launches:
        return ()
    candidates = facts_of(pid for pid in procfs.pids() if pid not in me.untouchable)
    return tuple(each for each in candidates if any(is_of(each, launch, me) for launch in launches))
