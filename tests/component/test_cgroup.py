"""The engine's family as a real cgroup: nothing escapes it, one write ends it, the kernel says when it is empty."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import procs
from tests.cgroups import ServiceCgroup
from vllmd.system import cgroup as cgroups
from vllmd.system.cgroup import CgroupFamily, delegation_refusal
from vllmd.system.cgroupnames import unified_mount
from vllmd.system.process import Child, SpawnSpec, spawn

pytestmark = pytest.mark.component

PYTHON = sys.executable
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Listener:
    inode: int
    pids: tuple[int, ...] = ()
    cgroup: str = ""


@pytest.fixture
def group() -> Iterator[ServiceCgroup]:
    group = ServiceCgroup()
    yield group
    group.remove()


ESCAPING = """
import ctypes, os, signal, sys, time
def leave(depth):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            ctypes.CDLL(None).prctl(15, b"kworker/0:1", 0, 0, 0)
            print("left", flush=True)
            if depth:
                leave(depth - 1)
            else:
                os.execve("/bin/sleep", ["[kthreadd]", "300"], {})
            time.sleep(300)
        os._exit(0)
leave(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)
"""

MANY = """
import os, time
for _ in range(199):
    if os.fork() == 0:
        time.sleep(300)
print("left\\n" * 4, flush=True)
time.sleep(300)
"""


def launch(family: CgroupFamily, code: str, scenario: Callable[[Child], Awaitable[None]]) -> None:
    async def main() -> None:
        family.prepare("one")
        child = await spawn(SpawnSpec((PYTHON, "-I", "-S", "-c", code), {}, family.cgroup_dir), lambda pid, start: None)
        try:
            await scenario(child)
        finally:
            family.kill()
            assert await family.wait_empty(10)
            await child.wait()
            child.close()
            os.close(child.stdout)
            os.close(child.stderr)

    asyncio.run(main())


def read_lines(child: Child, count: int) -> None:
    text = b""
    while text.count(b"\n") < count:
        text += os.read(child.stdout, 1000)


def test_who_renames_itself_double_forks_and_cleans_its_environment_is_still_found(group: ServiceCgroup) -> None:
    family = CgroupFamily(group.path)

    async def scenario(child: Child) -> None:
        read_lines(child, 4)
        procs.wait_until("the end of those between", lambda: len(family.pids()) == 5)
        pids = family.pids()
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        assert not await family.wait_empty(0.1)
        family.kill()
        assert await family.wait_empty(10)
        assert not any(map(procs.is_alive, pids))
        assert family.remove()

    launch(family, ESCAPING, scenario)
    assert [path.name for path in group.path.iterdir() if path.is_dir()] == ["supervisor"]


def test_two_hundred_processes_end_at_once(group: ServiceCgroup) -> None:
    family = CgroupFamily(group.path)

    async def scenario(child: Child) -> None:
        read_lines(child, 4)
        assert len(family.pids()) == 200
        started = time.monotonic()
        family.kill()
        assert await family.wait_empty(10)
        assert time.monotonic() - started < 3.0

    launch(family, MANY, scenario)


def test_before_linux_5_14_the_group_is_frozen_and_killed_by_hand(group: ServiceCgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "KILL_FILE", "cgroup.absent")
    family = CgroupFamily(group.path)

    async def scenario(child: Child) -> None:
        read_lines(child, 4)
        family.kill()
        assert await family.wait_empty(10)
        assert family.pids() == ()

    launch(family, MANY, scenario)


def test_waiting_for_the_end_does_not_spin_and_ends_at_once(group: ServiceCgroup) -> None:
    """cgroup.events is always readable: watched by a plain add_reader it wakes the loop 350,000 times a second."""
    family = CgroupFamily(group.path)

    async def scenario(child: Child) -> None:
        cpu = time.process_time()
        assert not await family.wait_empty(0.5)
        assert time.process_time() - cpu < 0.1
        waiting = asyncio.create_task(family.wait_empty(10))
        await asyncio.sleep(0.05)
        started = time.monotonic()
        family.kill()
        assert await waiting
        assert time.monotonic() - started < 0.2, "by the kernel's event, not by looking every quarter of a second"

    launch(family, "import time; time.sleep(300)", scenario)


def test_groups_that_the_engine_made_below_its_own_go_too(group: ServiceCgroup) -> None:
    family = CgroupFamily(group.path)

    async def scenario(child: Child) -> None:
        inner = Path(family.cgroup_dir) / "inner"
        inner.mkdir()
        with subprocess.Popen(["/bin/sleep", "300"]) as sleeper:
            (inner / "cgroup.procs").write_text(str(sleeper.pid))
            assert sleeper.pid in family.pids()
            assert not family.remove()
            family.kill()
            assert await family.wait_empty(10)
        assert family.remove()

    launch(family, "import time; time.sleep(300)", scenario)


def test_a_start_sweeps_what_earlier_launches_left(group: ServiceCgroup) -> None:
    old = group.path / "engine-old"
    empty = group.path / "engine-empty"
    old.mkdir()
    empty.mkdir()
    family = CgroupFamily(group.path)
    with subprocess.Popen(["/bin/sleep", "300"]) as sleeper, subprocess.Popen(["/bin/sleep", "300"]) as other:
        (old / "cgroup.procs").write_text(str(sleeper.pid))
        swept = asyncio.run(family.sweep())
        assert sleeper.wait(10) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()
    assert [(each.launch_id, each.pids, each.gone) for each in swept] == [("old", (sleeper.pid,), True)]
    assert str(swept[0]) == f"1 process of launch old ({sleeper.pid})"
    assert not old.exists()
    assert not empty.exists()


def test_whose_a_listener_is(group: ServiceCgroup) -> None:
    family = CgroupFamily(group.path)
    code = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.fileno(), flush=True)\nimport time; time.sleep(300)"

    async def scenario(child: Child) -> None:
        number = int(os.read(child.stdout, 100))
        inode = int(str(Path(f"/proc/{child.pid}/fd/{number}").readlink())[8:-1])
        path = family.cgroup_path
        assert path.endswith(f"{group.path.name}/engine-one")
        assert family.contains(Listener(inode, cgroup=path))
        assert family.contains(Listener(inode, cgroup=path + "/inner"))
        assert family.contains(Listener(0, pids=(1, child.pid)))
        assert family.contains(Listener(inode))
        assert not family.contains(Listener(0, cgroup=path + "2"))
        assert not family.contains(Listener(0, cgroup="/system.slice/nginx.service", pids=(1,)))
        with socket.socket() as stranger:
            assert not family.contains(Listener(os.fstat(stranger.fileno()).st_ino))

    launch(family, code, scenario)
    assert family.remove()
    assert not family.contains(Listener(1, cgroup="/"))


def test_cpu_time_of_the_whole_family_counts_also_of_those_who_ended(group: ServiceCgroup) -> None:
    family = CgroupFamily(group.path)
    assert family.cpu_s() == 0.0
    burn = "import os, time\nif os.fork() == 0:\n    while time.process_time() < 0.3: pass\n    os._exit(0)\nos.wait(); print(flush=True); time.sleep(300)"

    async def scenario(child: Child) -> None:
        read_lines(child, 1)
        assert family.cpu_s() >= 0.3

    launch(family, burn, scenario)


# --- whose cgroup may be taken

CHOOSE = """
import os
from pathlib import Path
from vllmd.system.cgroup import choose_family
family = choose_family(os.environ)
family.prepare("x")
print(family.describe())
print(next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")))
"""


def choose(argv: list[str], **environ: str) -> list[str]:
    base = {name: value for name, value in os.environ.items() if name != "INVOCATION_ID"}
    done = subprocess.run(argv, env=base | environ, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.splitlines()


def test_a_service_moves_itself_to_a_leaf_and_makes_the_engines_group(group: ServiceCgroup) -> None:
    said, where = choose(group.enter([PYTHON, "-c", CHOOSE]), INVOCATION_ID="1")
    path = unified_mount().path(str(group.path))
    assert said == f"cgroup {path}/engine-x"
    assert where == f"0::{path}/supervisor"


def test_systemds_own_mark_counts_also_for_a_scope(group: ServiceCgroup) -> None:
    group.path = scope = group.path.with_name("run-1.scope")
    scope.mkdir()
    assert choose(group.enter([PYTHON, "-c", CHOOSE]))[0].startswith("processes found by")
    try:
        os.setxattr(scope, "user.delegate", b"1")
    except OSError:
        os.setxattr(scope, "trusted.delegate", b"1")
    assert choose(group.enter([PYTHON, "-c", CHOOSE]))[0].startswith("cgroup ")


def test_a_group_shared_with_a_shell_is_never_taken(group: ServiceCgroup) -> None:
    shell = ["/bin/sh", "-c", 'echo $$ > "$0" && "$@"; true', str(group.path / "cgroup.procs"), PYTHON, "-c", CHOOSE]
    said, where = choose(shell, INVOCATION_ID="1")
    assert "shared with other processes" in said
    assert where.endswith("vllmd@test.service")


def test_the_root_group_and_an_absent_hierarchy_are_never_taken() -> None:
    environ = {"INVOCATION_ID": "1"}
    assert "root" in delegation_refusal(Path(unified_mount().point), environ)
    assert "no unified" in delegation_refusal(None, environ)


def test_in_a_shell_the_processes_are_held_and_it_says_so() -> None:
    said = choose([PYTHON, "-c", CHOOSE])[0]
    assert said.startswith("processes found by environment, session and parent (no delegated cgroup: ")
