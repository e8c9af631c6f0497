"""Whose sockets are these? From listeners (uid, cgroup) to processes, and to the facts that the owner test wants.

The processes of the listener's own cgroup are looked into first: with systemd that is a handful, and the walk over all
of /proc (80 ms with 2,000 processes) is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllmd.preflight.owner import ProcessFacts
from vllmd.preflight.report import Listener
from vllmd.system import cgroupnames, procfs

LAUNCH_VARIABLE = "VLLMD_LAUNCH_ID"


@dataclass(frozen=True, slots=True)
class Claim:
    """A listener with the processes that hold it. `neighbours`: where none can be seen, the processes of its user in its
    cgroup, which tell what kind of owner it is, though not which process."""

    listener: Listener
    holders: tuple[ProcessFacts, ...] = ()
    neighbours: tuple[ProcessFacts, ...] = ()


def facts(pid: int) -> ProcessFacts | None:
    """What /proc says of a process; None when it is gone, or dead and not reaped."""
    found = procfs.stat(pid)
    if found is None or found.is_dead:
        return None
    return ProcessFacts(
        pid=pid,
        ppid=found.ppid,
        uid=procfs.uid(pid),
        start_time=found.start_time,
        comm=found.comm,
        argv=procfs.cmdline(pid),
        exe=procfs.exe(pid),
        cgroup=procfs.cgroup(pid),
        launch_id=procfs.variable(pid, LAUNCH_VARIABLE),
    )


def facts_of(pids: Iterable[int]) -> tuple[ProcessFacts, ...]:
    return tuple(found for pid in pids if (found := facts(pid)) is not None)


def attribute(listeners: Iterable[Listener]) -> list[Claim]:
    """Claims in the order of the listeners. OSError where there is no /proc."""
    listeners = list(listeners)
    holders = _holders(listeners)
    return [_claim(each, facts_of(holders[each.inode] if each.port else each.pids)) for each in listeners]


def _claim(listener: Listener, holders: tuple[ProcessFacts, ...]) -> Claim:
    if not holders:
        return Claim(replace(listener, pids=()), neighbours=_neighbours(listener))
    # Where a process serves now is where it is; the socket's own cgroup is where it was made, by whoever made it.
    cgroup = next((each.cgroup for each in holders if each.cgroup not in ("", "/")), listener.cgroup)
    uid = holders[0].uid if holders[0].uid is not None else listener.uid
    named = replace(
        listener, pids=tuple(each.pid for each in holders), cgroup=cgroup, unit=cgroupnames.unit_of(cgroup), uid=uid
    )
    return Claim(named, holders)


def _holders(listeners: list[Listener]) -> dict[int, list[int]]:
    inodes = {each.inode for each in listeners if each.port and each.inode}
    near = {pid for each in listeners if each.cgroup != "/" for pid in cgroupnames.members(each.cgroup)}
    found: dict[int, list[int]] = {each.inode: [] for each in listeners}
    found |= procfs.socket_holders(inodes, sorted(near))
    missing = [inode for inode in inodes if not found[inode]]
    if missing:
        found |= procfs.socket_holders(missing, (pid for pid in procfs.pids() if pid not in near))
    return found


def _neighbours(listener: Listener) -> tuple[ProcessFacts, ...]:
    if not listener.cgroup or listener.uid is None:
        return ()
    return tuple(each for each in facts_of(cgroupnames.members(listener.cgroup)) if each.uid == listener.uid)
