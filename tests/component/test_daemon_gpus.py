"""Daemons on a host with GPUs: one to a GPU, none on a sick one, none without its memory, and none that leaves any behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from tests import procs
from tests.component.gpu_hosts import TOTAL_MIB, GpuHost, uuid
from tests.harness import Instance
from vllmd.config.paths import root_paths
from vllmd.core.xids import HINTS
from vllmd.gpu import leases, quarantine
from vllmd.gpu.quarantine import Record

pytestmark = pytest.mark.component


def seen_by_engine(instance: Instance) -> str | None:
    return procs.environ_of(instance.launch_json()["pid"]).get("CUDA_VISIBLE_DEVICES")


def stop(instance: Instance) -> None:
    """Not daemons.stop: instances of one host share its root, and one may go on."""
    instance.signal(signal.SIGTERM)
    assert instance.wait_exit() == 0, instance.describe()


def refused(instance: Instance, status: int, code: str) -> dict[str, Any]:
    assert instance.wait_exit() == status, instance.describe()
    error = dict(instance.last_json()["error"])
    assert error["code"] == code, error
    assert not (instance.state / "launch.json").exists(), "no engine was started"
    return error


def holders(host: GpuHost) -> dict[str, list[str]]:
    return {each: [holder.instance for holder in found] for each, found in leases.holders(root_paths(host.root)).items()}


# -- leases


def test_a_second_instance_is_told_who_has_the_gpu_and_gets_it_when_that_one_ends() -> None:
    with GpuHost() as host, host.instance("one") as one:
        one.wait_ready()
        assert one.status_json()["gpus"] == [uuid(0)]
        assert holders(host) == {uuid(0): ["one"]}
        with host.instance("two") as two:
            error = refused(two, 75, "gpu_leased")
            assert f"instance one (pid {one.pid}" in error["what"]
            assert "gpus_shared" in error["hint"]
            stop(one)
            assert holders(host) == {}
            two.start()
            two.wait_ready()
            stop(two)


def test_a_start_waits_for_an_instance_that_is_just_stopping() -> None:
    with GpuHost() as host, host.instance("one") as one:
        one.wait_ready()
        with host.instance("two", {"preflight": {"gpu_wait_s": 60}}) as two:
            procs.wait_until("the wait", lambda: "the start waits for GPUs" in two.log())
            stop(one)
            two.wait_ready()
            assert "instance one" in two.log()
            stop(two)


def test_a_stop_ends_the_wait() -> None:
    with GpuHost() as host, host.instance("one") as one:
        one.wait_ready()
        with host.instance("two", {"preflight": {"gpu_wait_s": 60}}) as two:
            procs.wait_until("the wait", lambda: "the start waits for GPUs" in two.log())
            stop(two)
        stop(one)


def test_the_lease_ends_with_a_supervisor_that_is_killed_and_no_engine_process_has_it() -> None:
    with GpuHost() as host, host.instance("one", cgroup=True) as one:
        one.wait_ready()
        for pid in one.engine_pids():
            held = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
            assert not [each for each in held if "/run/gpus/" in each]
        one.signal(signal.SIGKILL)
        one.wait_exit()
        assert holders(host) == {}
        one.start()
        one.wait_ready()
        stop(one)


def test_two_that_share_on_purpose_run_side_by_side() -> None:
    shared = {"gpus_shared": True, "serve": {"gpu_memory_utilization": 0.4}}
    with GpuHost() as host, host.instance("one", shared) as one, host.instance("two", shared) as two:
        one.wait_ready()
        two.wait_ready()
        assert sorted(holders(host)[uuid(0)]) == ["one", "two"]
        stop(one)
        stop(two)


def test_a_lease_file_that_is_a_symlink_is_refused_and_its_target_untouched(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with GpuHost() as host:
        gpus = host.root / "run/gpus"
        gpus.mkdir(parents=True)
        (gpus / uuid(0)).symlink_to(victim)
        with host.instance() as instance:
            refused(instance, 77, "lease_refused")
    assert victim.read_text() == "precious"


# -- choosing


def test_a_number_takes_free_gpus_and_each_instance_its_own() -> None:
    with GpuHost(3) as host, host.instance("one", {"gpus": 1}) as one:
        one.wait_ready()
        host.memory(0, 72500, (one.launch_json()["pid"], 72000))
        with host.instance("two", {"gpus": 1}) as two:
            two.wait_ready()
            assert (seen_by_engine(one), seen_by_engine(two)) == (uuid(0), uuid(1))
            assert holders(host) == {uuid(0): ["one"], uuid(1): ["two"]}
            stop(two)
        host.memory(0)
        stop(one)


def test_three_that_start_at_once_take_a_gpu_each_without_waiting() -> None:
    """Each chooses before the others have leased: who comes second takes the next."""
    config = {"gpus": 1, "preflight": {"gpu_wait_s": 0}}
    with GpuHost(3) as host, contextlib.ExitStack() as stack:
        three = [stack.enter_context(host.instance(name, config)) for name in ("one", "two", "three")]
        for instance in three:
            instance.wait_ready(60)
        assert {seen_by_engine(instance) for instance in three} == {uuid(0), uuid(1), uuid(2)}
        for instance in three:
            stop(instance)


def test_a_number_passes_over_a_lost_gpu() -> None:
    with GpuHost(2) as host:
        host.stub.gpu(0, fails=15)
        with host.instance(config={"gpus": 1}) as instance:
            instance.wait_ready()
            assert seen_by_engine(instance) == uuid(1)
            stop(instance)


def test_a_list_of_indices_reaches_the_engine_as_uuids_and_all_as_nothing() -> None:
    """CUDA counts the fastest GPU first, NVML by the bus: an index means two things, a UUID one."""
    with GpuHost(2) as host, host.instance("one", {"gpus": ["1"]}) as one:
        one.wait_ready()
        assert seen_by_engine(one) == uuid(1)
        assert holders(host) == {uuid(1): ["one"]}
        stop(one)
        with host.instance("two") as two:
            two.wait_ready()
            assert seen_by_engine(two) is None
            assert sorted(holders(host)) == [uuid(0), uuid(1)]
            stop(two)


@pytest.mark.parametrize("token", ["7", "GPU-deadbeef"])
def test_a_gpu_that_is_not_there_is_named(token: str) -> None:
    with GpuHost() as host, host.instance(config={"gpus": [token]}) as instance:
        assert f"there is no GPU {token}" in refused(instance, 69, "gpu_hard_fail")["what"]


def test_a_lost_gpu_of_ours_refuses() -> None:
    with GpuHost(2) as host:
        host.stub.gpu(1, fails=15)
        with host.instance() as instance:
            assert "GPU 1" in refused(instance, 69, "gpu_hard_fail")["what"]


def test_a_driver_that_hangs_at_preflight_refuses_at_the_deadline() -> None:
    with GpuHost() as host:
        host.stub.set(hang="nvmlDeviceGetMemoryInfo")
        with host.instance(config={"preflight": {"gpu_timeout_s": 1.5}}) as instance:
            assert "did not answer within 1.5 s" in refused(instance, 69, "gpu_hard_fail")["what"]


def test_on_a_host_without_driver_nobody_is_asked_twice_and_nothing_is_leased() -> None:
    with GpuHost() as host:
        host.stub.set(init=9)
        with host.instance() as instance:
            instance.wait_ready()
            assert holders(host) == {}
            assert instance.status_json()["gpus"] == []
            stop(instance)


# -- MIG


def test_mig_devices_are_leased_one_by_one_and_keep_their_gpu_from_being_taken_whole() -> None:
    mine, others = "MIG-aaaaaaaa-1111-2222-3333-444455556666", "MIG-bbbbbbbb-1111-2222-3333-444455556666"
    with GpuHost() as host:
        host.stub.slices(0, (mine, 10000, 9900), (others, 10000, 9900))
        with host.instance("one", {"gpus": [mine]}) as one, host.instance("two", {"gpus": [others]}) as two:
            one.wait_ready()
            two.wait_ready()
            assert (seen_by_engine(one), seen_by_engine(two)) == (mine, others)
            assert {each: sorted(names) for each, names in holders(host).items()} == {uuid(0): ["one", "two"], mine: ["one"], others: ["two"]}
            with host.instance("whole", {"gpus": ["0"]}) as whole:
                refused(whole, 75, "gpu_leased")
            with host.instance("again", {"gpus": [mine]}) as again:
                assert "instance one" in refused(again, 75, "gpu_leased")["what"]
            stop(one)
            stop(two)


def test_the_memory_gate_looks_at_the_mig_device_and_not_at_its_gpu() -> None:
    mine = "MIG-aaaaaaaa-1111-2222-3333-444455556666"
    with GpuHost() as host:
        host.stub.slices(0, (mine, 10000, 4000))
        with host.instance(config={"gpus": [mine]}) as instance:
            assert "4000 of 10000 MiB free" in refused(instance, 75, "gpu_memory_taken")["what"]


# -- quarantine


def quarantine_gpu(host: GpuHost, index: int, cls: Literal["reset", "reboot", "replace"]) -> None:
    paths = root_paths(host.root)
    quarantine.add(paths, Record(uuid(index), cls, 79, "Xid 79: the GPU has fallen off the bus", HINTS[cls]))


@pytest.mark.parametrize("gpus", ["all", ["1"]])
def test_a_quarantined_gpu_refuses_with_what_to_do_before_anything_is_fetched(gpus: Any) -> None:
    with GpuHost(2) as host:
        quarantine_gpu(host, 1, "reboot")
        with host.instance(config={"gpus": gpus}) as instance:
            error = refused(instance, 69, "gpu_quarantined")
            assert "GPU 1 NVIDIA H100" in error["what"]
            assert "Xid 79" in error["what"]
            assert ", since 20" in error["what"]
            assert "rebooted" in error["hint"]
            assert "resolving" not in instance.log()
            assert holders(host) == {}


def test_a_number_passes_over_a_quarantined_gpu_and_says_so_when_too_few_are_left() -> None:
    with GpuHost(2) as host:
        quarantine_gpu(host, 0, "reset")
        with host.instance("one", {"gpus": 1}) as one:
            one.wait_ready()
            assert seen_by_engine(one) == uuid(1)
            stop(one)
        with host.instance("two", {"gpus": 2, "serve": {"tensor_parallel_size": 2}}) as two:
            assert "2 GPUs are wanted" in refused(two, 69, "gpu_quarantined")["what"]


def test_a_new_boot_lifts_what_needed_one_and_a_clear_what_needed_a_reset() -> None:
    with GpuHost() as host:
        paths = root_paths(host.root)
        quarantine.add(paths, Record(uuid(0), "reboot", 79, "Xid 79"), boot="11111111-2222-3333-4444-555555555555")
        with host.instance() as instance:
            instance.wait_ready()
            stop(instance)
            quarantine_gpu(host, 0, "reset")
            instance.start()
            refused(instance, 69, "gpu_quarantined")
            assert quarantine.clear(paths, uuid(0))
            instance.start()
            instance.wait_ready()
            stop(instance)


def test_an_engine_that_was_built_for_no_gpu_keeps_none_from_others() -> None:
    with GpuHost() as host:
        host.memory(0, TOTAL_MIB - 10)
        instance = host.instance()
        host.engine_for("cpu")
        with instance:
            instance.wait_ready()
            assert holders(host) == {}
            stop(instance)


# -- memory


def test_the_start_waits_for_memory_and_names_who_has_it() -> None:
    with GpuHost() as host, subprocess.Popen(["/bin/sleep", "600"]) as foreign:
        try:
            host.memory(0, TOTAL_MIB - 10000, (foreign.pid, 69000))
            with host.instance(config={"preflight": {"gpu_wait_s": 60}}) as instance:
                procs.wait_until("the wait", lambda: "the start waits for GPUs" in instance.log())
                assert f"10000 of {TOTAL_MIB} MiB free" in instance.log()
                assert f"sleep (pid {foreign.pid}" in instance.log()
                assert holders(host) == {uuid(0): ["demo"]}, "the gate stands under the lease"
                host.memory(0)
                instance.wait_ready()
                stop(instance)
        finally:
            foreign.kill()


def test_a_start_whose_memory_stays_taken_is_75_with_the_owner() -> None:
    with GpuHost() as host:
        host.memory(0, TOTAL_MIB - 10000, (os.getpid(), 69000))
        with host.instance() as instance:
            error = refused(instance, 75, "gpu_memory_taken")
            assert f"pid {os.getpid()}" in error["what"]
            assert holders(host) == {}


def test_memory_that_does_not_come_back_is_75_with_the_holder() -> None:
    config = {"stop": {"gpu_release_timeout_s": 1.0}}
    with GpuHost() as host, host.instance(config=config) as instance:
        instance.wait_ready()
        host.memory(0, 60000, (os.getpid(), 59000))
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 75, instance.describe()
        error = instance.last_json()["error"]
        assert error["code"] == "gpu_memory_not_back"
        assert "59500 MiB less free than before" in error["what"]
        assert f"pid {os.getpid()}" in error["what"]
        assert instance.engine() == []


def test_the_end_waits_for_memory_that_comes_back_late() -> None:
    with GpuHost() as host, host.instance() as instance:
        instance.wait_ready()
        host.memory(0, 60000)
        instance.signal(signal.SIGTERM)
        instance.wait_state("killing")
        procs.wait_until("the engine's end", lambda: not instance.engine())
        time.sleep(0.3)
        assert instance.daemon
        assert instance.daemon.poll() is None, "it waits"
        assert holders(host) == {uuid(0): ["demo"]}, "and keeps the lease"
        host.memory(0)
        assert instance.wait_exit() == 0


def test_the_first_failure_stays_the_reason_where_memory_does_not_come_back() -> None:
    config = {"stop": {"gpu_release_timeout_s": 0.5}}
    with GpuHost() as host, host.instance(config=config) as instance:
        instance.wait_ready()
        host.memory(0, 60000)
        instance.kill_engine("vllm")
        assert instance.wait_exit() == 75
        last = instance.last_json()
        assert last["error"]["code"] != "gpu_memory_not_back"
        assert json.dumps(last["status"]) == "75"
