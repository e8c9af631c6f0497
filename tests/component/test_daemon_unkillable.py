"""A process in state D, which no signal ends: the stop is bounded, says where it hangs, and no engine starts beside it."""

from __future__ import annotations

import signal
import time

import pytest

from tests import procs
from tests.cgroups import Frozen
from tests.component.daemons import quick, stop
from tests.harness import Instance

pytestmark = pytest.mark.component

BOTH = pytest.mark.parametrize("cgroup", [False, True], ids=["processes", "cgroup"])
SHORT = {"stop": {"kill_timeout_s": 0.6, "shutdown_timeout_s": 0, "start_grace_s": 0.3}}


def freeze_worker(instance: Instance, frozen: Frozen) -> int:
    worker = instance.engine_process("VLLM::Worker")
    frozen.freeze(worker.pid)
    return worker.pid


@BOTH
def test_the_stop_is_bounded_and_names_where_the_process_hangs(cgroup: bool) -> None:
    with quick(config=SHORT, cgroup=cgroup) as instance, Frozen() as frozen:
        instance.wait_ready()
        pid = freeze_worker(instance, frozen)
        instance.kill_engine("VLLM::EngineCore")
        began = time.monotonic()
        assert instance.wait_exit() == 75
        assert time.monotonic() - began < 15
        last = instance.last_json()
        assert last["status"] == 75
        assert last["error"]["code"] in ("engine_exited", "engine_died"), "the first failure stays the reason"
        [stuck] = last["unkillable"]
        assert (stuck["pid"], stuck["name"], stuck["state"]) == (pid, "VLLM::Worker", "D")
        assert any("do_syscall" in frame for frame in stuck["stack"]), "root may read its stack"
        assert f"processes cannot be killed: pid {pid} VLLM::Worker (state D, in " in instance.log()
        assert (instance.state / "launch.json").exists(), "the next start has to find it"


@BOTH
def test_no_engine_is_started_beside_it_and_the_start_after_its_end_goes_on(cgroup: bool) -> None:
    with quick(config=SHORT, cgroup=cgroup) as instance, Frozen() as frozen:
        instance.wait_ready()
        pid = freeze_worker(instance, frozen)
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 75
        assert instance.last_json()["error"]["code"] == "unkillable"
        began = time.monotonic()
        instance.start()
        assert instance.wait_exit() == 75
        assert time.monotonic() - began < 10, "one deadline, not one for each way to look"
        error = instance.last_json()["error"]
        assert error["code"] == "unkillable"
        assert f"an earlier launch cannot be ended: launch {instance.launch_json()['launch_id']}: pid {pid}" in error["what"]
        assert instance.last_json()["unkillable"][0]["state"] == "D"
        frozen.thaw()
        procs.wait_until("its end", lambda: not procs.is_alive(pid))
        instance.start()
        instance.wait_ready()
        stop(instance)
