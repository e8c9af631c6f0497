"""Without a cgroup: finding and ending the family by what /proc says, and what a killed supervisor left by its record."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import procs
from tests.cgroups import ServiceCgroup
from vllmd.system import launch
from vllmd.system.cgroupnames import unified_mount
from vllmd.system.host import boot_id, process_stat, start_time
from vllmd.system.launch import Launch
from vllmd.system.members import Members, kill_exactly

pytestmark = pytest.mark.component

PYTHON = sys.executable
ROOT = Path(__file__).parents[2]

RECORD = Launch("abc-1", boot_id(), os.getpid(), 1, "", os.geteuid(), "2026-01-01T00:00:00Z")


# --- the record


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    launch.write(tmp_path, RECORD)
    assert launch.read(tmp_path) == RECORD
    launch.forget(tmp_path)
    launch.forget(tmp_path)
    warnings: list[str] = []
    assert launch.read(tmp_path, warnings.append) is None
    assert warnings == []


@pytest.mark.parametrize(
    "change",
    ["nonsense", "[]", {"schema": 2}, {"pid": "7"}, {"pid": True}, {"pid": 1}, {"pid": -1}, {"launch_id": "../x"}, {"launch_id": None}, {"uid": 1.5}],
)
def test_a_damaged_record_is_ignored_with_a_warning(tmp_path: Path, change: object) -> None:
    value = {"schema": 1, **dataclasses.asdict(RECORD)}
    text = json.dumps(value | change) if isinstance(change, dict) else str(change)
    (tmp_path / "launch.json").write_text(text)
    warnings: list[str] = []
    assert launch.read(tmp_path, warnings.append) is None
    assert len(warnings) == 1
    assert asyncio.run(launch.recover(tmp_path)) == []


def test_a_record_that_is_a_link_or_huge_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "launch.json").symlink_to("/proc/self/stat")
    assert launch.read(tmp_path) is None
    (tmp_path / "launch.json").unlink()
    (tmp_path / "launch.json").write_text(" " * 100_000 + "{}")
    assert launch.read(tmp_path) is None


# --- recovery

SUPERVISOR = """
import asyncio, os, signal, sys
from pathlib import Path
from vllmd.system import launch
from vllmd.system.host import boot_id
from vllmd.system.process import SpawnSpec, spawn

state, group, code = sys.argv[1:]

def before(pid, start):
    launch.write(Path(state), launch.Launch("abc-1", boot_id(), pid, start, group, os.geteuid(), "now"))

async def main():
    spec = SpawnSpec((sys.executable, "-I", "-S", "-c", code), {"VLLMD_LAUNCH_ID": "abc-1"}, group)
    child = await spawn(spec, before)
    print(os.read(child.stdout, 1000).decode(), flush=True)
    signal.pause()

asyncio.run(main())
"""

ENGINE = """
import os, signal, sys, time
pids = []
def worker(act):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        act()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(write, str(os.getpid()).encode())
        time.sleep(300)
    pids.append(int(os.read(read, 100)))
worker(lambda: None)
worker(os.setsid)
def clean():
    os.setsid()
    if os.fork():
        os._exit(0)
worker(clean)
def execute():
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", "import os, time; os.write(%d, str(os.getpid()).encode()); time.sleep(300)" % last], {})
last = 0
read, last = os.pipe()
os.set_inheritable(last, True)
pid = os.fork()
if pid == 0:
    execute()
pids.append(int(os.read(read, 100)))
print(os.getpid(), *pids, flush=True)
time.sleep(300)
"""


@contextlib.contextmanager
def killed_supervisor(state: Path, group: str = "") -> Iterator[list[int]]:
    """What is left when it was killed by SIGKILL: main process first; then a worker, one in a session of its own, a daemon,
    one with an empty environment."""
    with subprocess.Popen([PYTHON, "-c", SUPERVISOR, str(state), group, ENGINE], stdout=subprocess.PIPE, cwd=ROOT) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(word) for word in supervisor.stdout.readline().split()]
        supervisor.kill()
    try:
        yield pids
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_workers_that_outlived_their_supervisor_are_ended_by_the_next_one(tmp_path: Path) -> None:
    with killed_supervisor(tmp_path) as (main, *workers):
        procs.wait_until("the main process's end", lambda: not procs.is_alive(main))
        assert all(map(procs.is_alive, workers))
        swept = asyncio.run(launch.recover(tmp_path))
        assert not any(map(procs.is_alive, workers))
    assert len(swept) == 1
    assert swept[0].gone
    assert set(swept[0].pids) == set(workers)
    assert launch.read(tmp_path) is None


def test_a_launch_in_a_cgroup_is_ended_with_its_cgroup(tmp_path: Path) -> None:
    group = ServiceCgroup()
    engine = group.path / "engine-abc-1"
    engine.mkdir()
    try:
        with killed_supervisor(tmp_path, str(engine)) as pids:
            assert all(map(procs.is_alive, pids)), "the kernel does not end them: systemd, or we, must"
            swept = asyncio.run(launch.recover(tmp_path))
            assert not any(map(procs.is_alive, pids))
        assert set(swept[0].pids) == set(pids)
        assert not engine.exists()
    finally:
        group.remove()


@pytest.fixture
def bystander() -> Iterator[int]:
    with subprocess.Popen(["/bin/sleep", "300"], start_new_session=True, env={}) as sleeper:
        yield sleeper.pid
        assert sleeper.poll() is None, "a process that is not ours was killed"
        sleeper.kill()


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "another"},
        {"uid": os.geteuid() + 1},
        {"start_time": 12},
        {"start_time": 1 << 50},
    ],
)
def test_a_pid_that_was_given_to_somebody_else_is_never_hit(tmp_path: Path, bystander: int, change: dict[str, object]) -> None:
    record = dataclasses.replace(RECORD, pid=bystander, start_time=start_time(bystander))
    launch.write(tmp_path, dataclasses.replace(record, **change))  # type: ignore[arg-type]
    assert asyncio.run(launch.recover(tmp_path)) == []
    assert procs.is_alive(bystander)


@pytest.mark.parametrize("name", ["vllmd@test.service", "engine-other", ".", ".."])
def test_a_cgroup_that_is_not_the_launchs_own_is_never_killed(tmp_path: Path, name: str) -> None:
    group = ServiceCgroup()
    try:
        with subprocess.Popen(["/bin/sleep", "300"], env={}) as sleeper:
            target = group.top / name if name != "." else group.path / "engine-abc-1" / ".."
            if name == "engine-other":
                target.mkdir()
            (group.path / "cgroup.procs").write_text(str(sleeper.pid))
            cgroup = str(target).removeprefix(unified_mount().point)
            launch.write(tmp_path, dataclasses.replace(RECORD, cgroup=cgroup))
            assert asyncio.run(launch.recover(tmp_path)) == []
            assert sleeper.poll() is None
            sleeper.kill()
    finally:
        group.remove()


def test_a_pid_that_changes_hands_between_look_and_kill_is_not_hit(bystander: int) -> None:
    seen = process_stat(bystander)
    assert seen is not None
    kill_exactly(dataclasses.replace(seen, start_time=seen.start_time - 1))


LEAVING = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    os.execve("/bin/sh", ["sh", "-c", "echo $$; exec sleep 300"], {})
time.sleep(300)
"""


def test_who_was_seen_as_a_member_stays_one_when_its_parent_is_gone() -> None:
    argv = [PYTHON, "-I", "-S", "-c", LEAVING]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True, env={"VLLMD_LAUNCH_ID": "mine"}) as main:
        assert main.stdout is not None
        left = int(main.stdout.readline())
        members = Members("mine", os.geteuid(), main.pid, start_time(main.pid))
        try:
            assert {each.pid for each in members.find()} == {main.pid, left}
            main.kill()
            main.wait()
            assert [each.pid for each in members.find()] == [left]
            members.kill()
            procs.wait_until("its end", lambda: not procs.is_alive(left))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


def test_our_own_session_is_never_a_member(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["/bin/sleep", "300"], env={"VLLMD_LAUNCH_ID": "mine"}) as sleeper:
        assert Members("mine", os.geteuid()).find() == []
        sleeper.kill()


ESCAPED = ENGINE.replace(
    "last = 0",
    """
def escape():
    os.setsid()
    if os.fork():
        os._exit(0)
    execute()
read, last = os.pipe()
os.set_inheritable(last, True)
if os.fork() == 0:
    escape()
pids.append(int(os.read(read, 100)))
""",
)
"""And a daemon with a session of its own and an empty environment: only the subreaper knows it."""

# --- the family without a cgroup, in a supervisor of its own (a subreaper for good)

FAMILY = """
import asyncio, json, os, sys
from dataclasses import dataclass
from pathlib import Path
from vllmd.system.host import all_processes
from vllmd.system.process import SpawnSpec, spawn
from vllmd.system.processfamily import ProcessFamily

@dataclass
class Listener:
    inode: int = 0
    pids: tuple = ()
    cgroup: str = ""

def mine():
    return [each.pid for each in all_processes() if each.ppid == os.getpid()]

async def main():
    family = ProcessFamily("test")
    family.prepare("abc-1")
    helper = await asyncio.create_subprocess_exec("/bin/sleep", "300")
    spec = SpawnSpec((sys.executable, "-I", "-S", "-c", sys.argv[1]), family.environment("abc-1"))
    child = await spawn(spec, lambda pid, start: None)
    while not (text := os.read(child.stdout, 1000)):
        pass
    expected = sorted(map(int, text.split()))
    result = {"expected": expected, "found": sorted(family.pids())}
    result["contains"] = [family.contains(Listener(pids=(expected[-1],))), family.contains(Listener(pids=(1,)))]
    result["alive"] = await family.wait_empty(0.05)
    family.kill()
    result["empty"] = await family.wait_empty(10)
    result["after"] = list(family.pids())
    result["status"] = (await child.wait()).describe()
    async with asyncio.timeout(10):
        while set(mine()) - {helper.pid}:
            await family.wait_empty(1)
            await asyncio.sleep(0.05)
    result["helper"] = helper.returncode
    helper.kill()
    result["reaped"] = await helper.wait()
    result["removed"] = family.remove()
    print(json.dumps(result))

asyncio.run(main())
"""


def test_without_a_cgroup_nobody_escapes_and_our_own_helpers_are_spared() -> None:
    done = subprocess.run([PYTHON, "-c", FAMILY, ESCAPED], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["found"] == result["expected"]
    assert len(result["found"]) == 6
    assert result["contains"] == [True, False]
    assert (result["alive"], result["empty"], result["after"]) == (False, True, [])
    assert result["status"] == "killed by SIGKILL"
    assert (result["helper"], result["reaped"]) == (None, -9)
    assert result["removed"] is True
