"""What grows: over many starts and stops, and within one life."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from pathlib import Path

import pytest

from tests import procs
from tests.component.daemons import QUICK, quick, stop
from tests.harness import MARK, Instance

pytestmark = pytest.mark.component


def shared_blocks(instance: Instance, pids: set[int]) -> set[str]:
    """In /dev/shm, of this instance's processes: other suites on the host have theirs."""
    return {path.name for path in Path("/dev/shm").iterdir() if pids.intersection(map(int, re.findall("[0-9]+", path.name)))}


def files(instance: Instance) -> set[str]:
    return {str(path.relative_to(instance.root)) for path in instance.root.rglob("*")}


@pytest.mark.parametrize("cycles", [3, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize("cgroup", [False, True], ids=["processes", "cgroup"])
def test_starts_and_stops_leave_nothing_that_adds_up(cycles: int, cgroup: bool) -> None:
    with quick({"FAKE_SPEED": "4", "FAKE_STRAY": "setsid,fork"}, cgroup=cgroup) as instance:
        instance.wait_ready()
        stop(instance)
        before, pids = files(instance), set[int]()
        groups = instance.cgroup.groups() if instance.cgroup else []
        for _ in range(cycles):
            instance.start()
            instance.wait_ready()
            pids |= {instance.pid, *instance.engine_pids()}
            stop(instance)
            assert not procs.with_environ(MARK, str(instance.root))
        assert files(instance) == before
        assert pids
        assert not shared_blocks(instance, pids)
        assert groups == (instance.cgroup.groups() if instance.cgroup else [])


def held(pid: int) -> tuple[list[str], int, int]:
    """Kinds of its descriptors, threads, and processes of its session."""
    kinds = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            kinds.append(str(path.readlink()).partition(":")[0])
    return sorted(kinds), len(list(Path(f"/proc/{pid}/task").iterdir())), len(procs.in_session(pid))


def quiet(pid: int) -> tuple[list[str], int, int]:
    """The least of half a second: a reload reads the keys in a thread of its own."""
    seen = []
    for _ in range(25):
        seen.append(held(pid))
        time.sleep(0.02)
    return min(seen, key=lambda each: (each[1], len(each[0])))


def private_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


@pytest.mark.parametrize("rounds", [40, pytest.param(2000, marks=pytest.mark.soak)])
def test_a_long_life_needs_no_more_descriptors_threads_or_memory(rounds: int) -> None:
    with quick(config={"watch": {"interval_s": 0.02}, "log": {"level": "error"}}) as instance:
        instance.wait_ready()
        exercise(instance, 20)
        before, memory = quiet(instance.pid), private_kib(instance.pid)
        exercise(instance, rounds)
        # a probe that is under way holds a connection
        procs.wait_until("as much as before", lambda: held(instance.pid) == before)
        assert private_kib(instance.pid) - memory < 4096
        assert instance.status()["state"] == "ready"
        stop(instance)


def exercise(instance: Instance, rounds: int) -> None:
    for index in range(rounds):
        instance.config["watch"] = {**QUICK["watch"], "interval_s": 0.02 + index % 7 / 1000}
        instance.write_config()
        instance.signal(signal.SIGHUP)
        assert instance.control("/metrics")[0] == 200
        assert instance.ask("/health")[0] == 200
