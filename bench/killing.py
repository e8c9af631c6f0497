"""SIGKILL of the engine's main process: when the last of its family is gone, and when the supervisor is. The time in which
it looks at what failed, before it kills, is a part of it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from bench import group, processes
from bench.place import MARK, BenchError, Place
from bench.table import Figure

EMPTY_BAR_S = 0.3
EXIT_BAR_S = 0.5
CROWD_BAR_S = 1.0
KILLS = 20
CROWD, CROWD_KILLS = 200, 10
CHILD_MB = 256
ORPHAN_S = 2.0
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Killed:
    """Seconds since the SIGKILL."""

    empty_s: float
    exit_s: float


def run() -> list[Figure]:
    env = {"BENCH_CHILD_MB": str(CHILD_MB)}
    figures = []
    alone = _alone(env)
    crowd_alone = _alone({"BENCH_CROWD": str(CROWD)})
    for cgroup in (True, False) if group.available() else (False,):
        with Place(cgroup=cgroup, env=env) as place:
            killed = [_once(place) for _ in range(KILLS)]
        where = "in a delegated cgroup" if cgroup else "without a cgroup"
        how = "by launch id and pidfd" if not cgroup else "cgroup.kill"
        figures += [
            Figure(f"SIGKILL of the engine to nothing left of it, {where}", [each.empty_s for each in killed], bar=EMPTY_BAR_S, against=alone),
            Figure("  to the supervisor's exit", [each.exit_s for each in killed], bar=EXIT_BAR_S, against=f"{how}; a child of {CHILD_MB} MiB"),
            _crowd(where, crowd_alone, cgroup=cgroup),
        ]
    return figures


def _crowd(where: str, alone: str, *, cgroup: bool) -> Figure:
    with Place(cgroup=cgroup, env={"BENCH_CROWD": str(CROWD)}) as place:
        killed = [_once(place) for _ in range(CROWD_KILLS)]
    return Figure(f"  the same with {CROWD} processes that ignore SIGTERM, {where}", [each.empty_s for each in killed], bar=CROWD_BAR_S, against=alone)


def _once(place: Place) -> Killed:
    place.start()
    place.ready_at()
    return kill(place)


def kill(place: Place) -> Killed:
    """SIGKILL of the engine's main process; waits for the end of all."""
    family = [pid for pid in processes.marked(MARK, str(place.root)) if pid != place.pid]
    blocks = set().union(*map(processes.shared_memory, family))
    with contextlib.ExitStack() as stack:
        gone = _Watch(family, place.pid, place.group.engine_group() if place.group else None)
        stack.callback(gone.close)
        main = int(place.launch()["pid"])
        began = time.monotonic()
        os.kill(main, signal.SIGKILL)
        empty, ended = gone.wait()
    place.wait_exit()
    for block in blocks:
        block.unlink(missing_ok=True)
    return Killed(empty - began, ended - began)


class _Watch:
    """Told by the kernel: pidfds of the family and of the supervisor, and cgroup.events where there is a cgroup."""

    def __init__(self, family: list[int], supervisor: int, directory: Path | None) -> None:
        self._poll = select.poll()
        self._supervisor = os.pidfd_open(supervisor)
        self._family = [] if directory else [os.pidfd_open(pid) for pid in family]
        self._events = os.open(directory / "cgroup.events", os.O_RDONLY) if directory else -1
        for fd in (self._supervisor, *self._family):
            self._poll.register(fd, select.POLLIN)
        if self._events >= 0:
            os.read(self._events, 1024)
            self._poll.register(self._events, select.POLLPRI)

    def wait(self) -> tuple[float, float]:
        """(when the family was gone, when the supervisor was), monotonic."""
        left = set(self._family)
        empty = ended = 0.0
        deadline = time.monotonic() + TIMEOUT_S
        while not (empty and ended):
            found = self._poll.poll(1000)
            now = time.monotonic()
            if now > deadline:
                raise BenchError("the engine's family did not end")
            for fd, _ in found:
                if fd == self._events:
                    empty = empty or (now if self._is_empty() else 0.0)
                    if not empty:
                        continue
                elif fd == self._supervisor:
                    ended = now
                left.discard(fd)
                self._poll.unregister(fd)
            if not left and self._events < 0:
                empty = empty or now
        return empty, ended

    def _is_empty(self) -> bool:
        """A group that was removed has been empty."""
        try:
            return b"populated 0" in os.pread(self._events, 1024, 0)
        except OSError:
            return True

    def close(self) -> None:
        for fd in (self._supervisor, *self._family, self._events):
            if fd >= 0:
                os.close(fd)


def _alone(env: dict[str, str]) -> str:
    """What a shell or a simple supervisor leaves: it sees the main process end, and nothing else."""
    with Place(env=env) as place:
        with place.alone():
            place.stamp("listening")
        time.sleep(ORPHAN_S)
        left = len(processes.marked(MARK, str(place.root)))
        return f"without a supervisor: {left} process{'es' if left != 1 else ''} left after {ORPHAN_S:g} s"
