"""Ending what holds a port: the whole family, nobody else, in bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest

from tests import procs
from tests.cgroups import ServiceCgroup
from tests.listeners import VLLM, holding
from tests.ports import free_port
from vllmd.preflight import reclaim
from vllmd.preflight.attribution import facts
from vllmd.preflight.claims import LaunchRecord, Me
from vllmd.preflight.owner import OwnerRules, ProcessFacts
from vllmd.system import procfs
from vllmd.system.cgroupnames import unified_mount

pytestmark = pytest.mark.component

NOBODY_ELSE = frozenset({os.getpid(), 1})
GRACE_S = 0.3


@pytest.fixture
def port() -> int:
    return free_port()


def root(pid: int) -> ProcessFacts:
    found = facts(pid)
    assert found is not None
    return found


def test_who_ends_at_sigterm_is_not_kept_waiting(port: int) -> None:
    with holding("127.0.0.1", port) as server:
        start = time.monotonic()
        assert reclaim.stop([root(server.pid)], NOBODY_ELSE, 30) == ([server.pid], [])
        assert time.monotonic() - start < 5


def test_who_ignores_sigterm_is_killed_after_the_grace(port: int) -> None:
    with holding("127.0.0.1", port, "--ignore-term") as server:
        start = time.monotonic()
        assert reclaim.stop([root(server.pid)], NOBODY_ELSE, GRACE_S) == ([server.pid], [])
        assert GRACE_S <= time.monotonic() - start < GRACE_S + 5


def test_a_child_that_ignores_sigterm_ends_with_its_parent_and_a_zombie_counts_as_ended(port: int) -> None:
    with holding("127.0.0.1", port, "--child", "stubborn", "--child", "zombie", "--ignore-term") as server:
        stubborn, zombie = server.children
        start = time.monotonic()
        ended, remaining = reclaim.stop([root(server.pid)], NOBODY_ELSE, GRACE_S)
        assert time.monotonic() - start < GRACE_S + 5
        assert (set(ended) >= {server.pid, stubborn}, remaining) == (True, [])
        assert not any(map(procs.is_alive, (server.pid, stubborn, zombie)))


def test_a_child_that_outlives_its_parents_sigterm_is_still_found(port: int) -> None:
    """At SIGTERM the parent ends at once: its stubborn child is then nobody's child any more."""
    with holding("127.0.0.1", port, "--child", "stubborn") as server:
        reclaim.stop([root(server.pid)], NOBODY_ELSE, GRACE_S)
        assert not procs.is_alive(server.children[0])


def test_a_child_that_left_the_tree_is_found_in_the_cgroup_of_its_launch(port: int, service: ServiceCgroup) -> None:
    group = service.path / "engine-4711"
    group.mkdir()
    enter = ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    with holding("127.0.0.1", port, "--child", "double-fork", before=enter) as server:
        ended, remaining = reclaim.stop([root(server.pid)], NOBODY_ELSE, GRACE_S)
        assert (set(ended), remaining) == ({server.pid, server.children[0]}, [])
        assert not procs.is_alive(server.children[0])


def test_a_child_that_left_the_tree_is_found_by_its_launch_id(port: int) -> None:
    with holding("127.0.0.1", port, "--child", "double-fork", env={"VLLMD_LAUNCH_ID": f"test-{port}"}) as server:
        reclaim.stop([root(server.pid)], NOBODY_ELSE, GRACE_S)
        assert not procs.is_alive(server.children[0])


def test_a_cgroup_shared_with_others_is_not_ended(port: int, service: ServiceCgroup) -> None:
    with holding("127.0.0.1", port, before=service.enter([])) as server, holding("127.0.0.2", port, before=service.enter([])) as other:
        reclaim.stop([root(server.pid)], NOBODY_ELSE, GRACE_S)
        assert not procs.is_alive(server.pid)
        assert procs.is_alive(other.pid)


def test_the_untouchable_survive_in_whatever_family_they_are(port: int) -> None:
    with holding("127.0.0.1", port, "--child", "stubborn") as server:
        reclaim.stop([root(server.pid)], NOBODY_ELSE | {server.children[0]}, GRACE_S)
        assert not procs.is_alive(server.pid)
        assert procs.is_alive(server.children[0])


def test_a_pid_that_is_used_again_is_not_hit(port: int) -> None:
    with holding("127.0.0.1", port) as other:
        former = root(other.pid)
        stale = ProcessFacts(former.pid, start_time=former.start_time - 1)
        assert reclaim.stop([stale], NOBODY_ELSE, GRACE_S) == ([], [])
        assert procs.is_alive(other.pid)


def test_a_stopped_process_is_killed_too(port: int) -> None:
    with holding("127.0.0.1", port) as server:
        os.kill(server.pid, signal.SIGSTOP)
        assert reclaim.stop([root(server.pid)], NOBODY_ELSE, GRACE_S) == ([server.pid], [])


def orphans(session: int) -> list[procs.Process]:
    """Those of the session, but its leader, whose parent is not in it."""
    found = procs.in_session(session)
    inside = {each.pid for each in found}
    return [each for each in found if each.pid != session and each.ppid not in inside and each.comm.startswith("VLLM::")]


def test_a_pid_that_is_used_again_while_it_is_looked_at_is_not_held(port: int) -> None:
    with holding("127.0.0.1", port) as other:
        now = procfs.stat(other.pid)
        assert now is not None
        family = reclaim.Family((), NOBODY_ELSE)
        assert not reclaim._hold(family, replace(now, start_time=now.start_time - 1))
        assert (family.seen, family.held) == ({}, {})


def test_a_renamed_worker_whose_server_is_gone_is_found_in_its_group(port: int) -> None:
    """As vLLM's own: EngineCore stays in the group of the API server, which is killed."""
    script = "import os,time; open('/proc/self/comm','w').write('VLLM::EngineCor')\nif os.fork(): time.sleep(99)\nos.fork() and os._exit(0)\ntime.sleep(99)"
    with subprocess.Popen(["python3", "-c", script], start_new_session=True) as server:
        try:
            worker = procs.wait_until("the orphan", lambda: orphans(server.pid))
            reclaim.stop([root(server.pid)], NOBODY_ELSE, GRACE_S)
            assert not any(procs.is_alive(each.pid) for each in worker)
        finally:
            procs.kill_all({server.pid, *(each.pid for each in procs.in_session(server.pid))})


def test_the_topmost_vllm_is_ended_and_not_the_shell_above_it(port: int) -> None:
    """Several API servers: the listener is the child of a `vllm serve` that would start it again."""
    script = "import subprocess, sys; subprocess.run(sys.argv[4:])"
    above = ["/bin/sh", "-c", '"$@"; :', "sh", "python3", "-c", script, "vllm", "serve", "model"]
    with holding("127.0.0.1", port, *VLLM, before=above) as server:
        parent = procfs.stat(server.pid)
        assert parent is not None
        found = reclaim.topmost(root(server.pid), OwnerRules(), frozenset())
        assert found.pid == parent.ppid
        assert reclaim.topmost(root(server.pid), OwnerRules(), {parent.ppid}).pid == server.pid


def test_leftovers_of_a_launch_are_found_although_nobody_listens(port: int, service: ServiceCgroup) -> None:
    group = service.path / "engine-abc"
    group.mkdir()
    enter = ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    by_cgroup = LaunchRecord("x", procfs.boot_id(), 1, 1, unified_mount().path(str(group)), os.geteuid())
    by_id = LaunchRecord(f"id-{port}", procfs.boot_id(), 1, 1, "", os.geteuid())
    former = LaunchRecord(f"id-{port}", "another boot", 1, 1, "", os.geteuid())
    me = Me(os.geteuid(), procfs.boot_id(), NOBODY_ELSE)
    env = {"VLLMD_LAUNCH_ID": f"id-{port}"}
    with holding("127.0.0.1", port, "--bound", before=enter) as first, holding("127.0.0.2", port, "--bound", env=env) as second:
        assert [each.pid for each in reclaim.leftovers([by_cgroup], me)] == [first.pid]
        assert [each.pid for each in reclaim.leftovers([by_id], me)] == [second.pid]
        assert reclaim.leftovers([former], me) == ()
