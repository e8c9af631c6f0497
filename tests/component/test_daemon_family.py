"""Nothing is left: of an engine whose processes hide, and of a supervisor that was killed, by the next start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import procs
from tests.component.daemons import Tampered, assert_nothing_left, ends, hold, quick, stop
from tests.harness import MARK, Instance
from tests.needs import need
from vllmd.system.host import boot_id, start_time
from vllmd.system.priority import WATCHING_NICE

pytestmark = pytest.mark.component

BOTH = pytest.mark.parametrize("cgroup", [False, True], ids=["processes", "cgroup"])
HIDING = "setsid,fork,rename,ignore"


@BOTH
def test_children_that_hide_are_gone_after_a_stop(cgroup: bool) -> None:
    """In a session of its own, double-forked, renamed, deaf to every signal."""
    with quick({"FAKE_STRAY": HIDING}, cgroup=cgroup) as instance:
        instance.wait_ready()
        assert [process for process in instance.engine() if process.comm == "innocent"]
        stop(instance)


@BOTH
def test_children_that_hide_are_gone_after_a_failure(cgroup: bool) -> None:
    with quick({"FAKE_STRAY": HIDING}, cgroup=cgroup) as instance:
        instance.wait_ready()
        instance.kill_engine("vllm")
        ends(instance, 70, "engine_exited", ready=True)


def test_a_child_without_its_environment_is_found_by_its_control_group() -> None:
    with quick({"FAKE_STRAY": f"{HIDING},env"}, cgroup=True) as instance:
        instance.wait_ready()
        assert [process for process in instance.engine() if process.comm == "innocent"]
        stop(instance)


def test_who_watches_goes_before_who_computes() -> None:
    """Beside the threads of a vLLM on CPUs a verdict came two seconds late. Who may not, is not refused for it."""
    with quick() as instance:
        instance.wait_ready()
        assert os.getpriority(os.PRIO_PROCESS, instance.pid) == (max(0, os.getpriority(os.PRIO_PROCESS, 0)) or (0 if os.geteuid() else WATCHING_NICE))
        assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in instance.engine_pids()} == {max(0, os.getpriority(os.PRIO_PROCESS, 0))}
        stop(instance)


def test_who_watches_goes_before_other_sessions_too() -> None:
    """Where the kernel shares the CPU by session, the supervisor waited 0.6 s for its turn beside a vLLM on CPUs."""
    need(os.geteuid() == 0 and os.getpriority(os.PRIO_PROCESS, 0) <= 0, "root, at no lower priority")
    need(Path("/proc/self/autogroup").exists(), "a kernel with autogroup")
    with quick() as instance:
        instance.wait_ready()
        assert Path(f"/proc/{instance.pid}/autogroup").read_text().split()[1:] == ["nice", str(WATCHING_NICE)]
        assert {Path(f"/proc/{pid}/autogroup").read_text().split()[2] for pid in instance.engine_pids()} == {"0"}
        stop(instance)


def test_a_download_does_not_go_before_who_computes() -> None:
    gate = hold(instance := quick(), "resolve")
    with instance:
        instance.wait_state("resolving")
        [resolver] = procs.wait_until("the resolver", lambda: [p for p in children(instance) if "vllmd.models.fetch" in p.cmdline])
        procs.wait_until("its priority", lambda: os.getpriority(os.PRIO_PROCESS, resolver.pid) == max(0, os.getpriority(os.PRIO_PROCESS, 0)))
        gate.touch()
        instance.wait_ready()
        stop(instance)


@BOTH
def test_the_launch_is_on_record_before_anything_can_be_left(cgroup: bool) -> None:
    with quick(cgroup=cgroup) as instance:
        instance.wait_ready()
        launch = instance.launch_json()
        pid = instance.engine_process("vllm").pid
        assert launch["pid"] == pid
        assert launch["start_time"] == start_time(pid)
        assert launch["boot_id"] == boot_id()
        assert procs.environ_of(pid)["VLLMD_LAUNCH_ID"] == launch["launch_id"]
        assert bool(launch["cgroup"]) is cgroup
        if cgroup:
            assert f"/engine-{launch['launch_id']}" in Path(f"/proc/{pid}/cgroup").read_text()
            assert "/supervisor" in Path(f"/proc/{instance.pid}/cgroup").read_text()
        stop(instance)


@BOTH
def test_after_sigkill_of_the_supervisor_the_next_start_ends_what_is_left(cgroup: bool) -> None:
    with quick({"FAKE_STRAY": HIDING}, cgroup=cgroup) as instance:
        instance.wait_ready()
        before = set(instance.engine_pids())
        first_launch = instance.launch_json()["launch_id"]
        instance.signal(signal.SIGKILL)
        instance.wait_exit()
        if not cgroup:  # PDEATHSIG; with a unit's cgroup systemd ends them
            procs.wait_until("the API server's end", lambda: not [p for p in instance.engine() if p.comm == "vllm"])
        left = set(instance.engine_pids())
        assert left, "else this proves nothing"
        instance.start()
        instance.wait_ready()
        assert (
            f"ended what an earlier launch had left: {len(left)} processes of launch {first_launch}" in instance.log()
        )
        assert not before & set(instance.engine_pids())
        assert not any(map(procs.is_alive, before))
        stop(instance)


def test_files_that_a_killed_supervisor_had_half_written_are_gone_after_the_next_start() -> None:
    """SIGKILL between the write and the rename of write_atomic; one in some fifty random kills."""
    instance = quick()
    half = [instance.state / ".launch.json.a2c17ee06ad2.tmp", instance.runtime / ".status.json.0123456789ab.tmp"]
    for path in half:
        path.parent.mkdir(parents=True)
        path.write_text('{"schema"')
    with instance:
        instance.wait_ready()
        assert not any(path.exists() for path in half)
        stop(instance)


def test_a_supervisor_that_is_killed_while_resolving_takes_its_resolver_along() -> None:
    hold(instance := quick(), "resolve")
    with instance:
        instance.wait_state("resolving")
        resolver = procs.wait_until(
            "the resolver", lambda: [p for p in children(instance) if "vllmd.models.fetch" in p.cmdline]
        )
        instance.signal(signal.SIGKILL)
        instance.wait_exit()
        procs.wait_until("its end", lambda: not procs.is_alive(resolver[0].pid))


def children(instance: Instance) -> list[procs.Process]:
    return [process for process in procs.processes() if process.ppid == instance.pid]


def test_a_record_of_another_boot_or_of_a_pid_that_is_another_process_ends_nobody() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    with quick() as instance, subprocess.Popen(sleeper) as stranger:
        try:
            instance.wait_ready()
            record = instance.launch_json()
            stop(instance)
            for change in (
                {"pid": stranger.pid, "start_time": start_time(stranger.pid) + 1},
                {"pid": stranger.pid, "start_time": start_time(stranger.pid), "boot_id": "another"},
            ):
                (instance.state / "launch.json").write_text(json.dumps({**record, **change}))
                instance.start()
                instance.wait_ready()
                assert stranger.poll() is None
                stop(instance)
        finally:
            stranger.kill()


@pytest.mark.parametrize("content", ["", '{"schema": 1, "pid": 1}', "[" * 50000], ids=["empty", "pid 1", "nested"])
def test_a_launch_record_that_makes_no_sense_is_passed_over(content: str) -> None:
    instance = quick()
    instance.state.mkdir(parents=True)
    (instance.state / "launch.json").write_text(content)
    with instance:
        instance.wait_ready()
        stop(instance)


def test_a_stop_leaves_other_peoples_processes_alone() -> None:
    """The launch id is what counts: not the name, nor the directory, nor the user."""
    argv = [sys.executable, "-c", "import time; time.sleep(600)", "vllm", "serve", "VLLM::EngineCore"]
    with quick() as instance, subprocess.Popen(argv, env={"VLLMD_LAUNCH_ID": "0" * 32}) as stranger:
        try:
            instance.wait_ready()
            instance.kill_engine("vllm")
            assert instance.wait_exit() == 70
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_while_it_serves_the_supervisor_has_one_child_and_reaps_the_others() -> None:
    """Without a cgroup it is a subreaper: what forks out of the engine becomes its child."""
    with quick({"FAKE_STRAY": "fork"}) as instance:
        instance.wait_ready()
        stray = next(process for process in instance.engine() if process.comm == "VLLM::Stray")
        assert stray.ppid == instance.pid
        os.kill(stray.pid, signal.SIGKILL)
        stop(instance)
        assert not procs.with_environ(MARK, str(instance.root))


FORKED = """
import os
if os.fork():
    os.wait()
    os._exit(0)
"""


def test_the_daemon_in_a_process_of_its_own_session_cleans_up_all_the_same() -> None:
    """In a shell, without systemd and without any session leader to kill its group."""
    instance = Tampered.quick(FORKED)
    with instance:
        ready = instance.notify.wait(lambda message: message.get("READY") == "1", 30, lambda: False)
        assert ready
        os.kill(ready.pid, signal.SIGTERM)
        assert instance.wait_exit() == 0
        assert_nothing_left(instance)
