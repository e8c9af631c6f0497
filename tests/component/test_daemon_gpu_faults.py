"""GPUs that fail under a serving engine: what ends it, what forbids the next start, and what is nothing to it."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from tests import procs
from tests.component.daemons import watch_for
from tests.component.gpu_hosts import GpuHost, uuid
from tests.fakes.gpu_host import GpuService
from tests.fakes.nvml import pci
from tests.harness import Instance
from vllmd.config.paths import root_paths
from vllmd.core.gpu_findings import of_xid
from vllmd.gpu import quarantine

pytestmark = pytest.mark.component

OFTEN: dict[str, Any] = {"gpu_watch": {"interval_s": 0.2, "call_timeout_s": 1.0}, "preflight": {"gpu_timeout_s": 3.0}}


def ended(instance: Instance, status: int, code: str) -> dict[str, Any]:
    assert instance.wait_exit() == status, instance.describe()
    error = dict(instance.last_json()["error"])
    assert error["code"] == code, error
    assert instance.engine() == []
    return error


def watched(instance: Instance) -> None:
    """Ready, and the watch over its GPUs has begun."""
    instance.wait_ready()
    procs.wait_until("the first snapshot", lambda: "vllmd_gpu" in instance.control("/metrics")[1])


def test_a_gpu_that_is_lost_while_serving_is_69_and_no_start_follows() -> None:
    with GpuHost(2) as host, host.instance(config={**OFTEN, "gpus": ["1"]}) as instance:
        watched(instance)
        host.stub.gpu(1, fails=15)
        ended(instance, 69, "gpu_lost")
        record = quarantine.read(root_paths(host.root))[uuid(1)]
        assert record.cls == "reboot"
        host.stub.gpu(1, fails=None)  # the driver may well show it again; it is not to be trusted before the reboot
        instance.start()
        assert "quarantined" in ended(instance, 69, "gpu_quarantined")["what"]


def test_a_gpu_that_is_not_ours_may_be_lost() -> None:
    with GpuHost(2) as host, host.instance(config={**OFTEN, "gpus": ["0"]}) as instance:
        watched(instance)
        host.stub.gpu(1, fails=15)
        watch_for(1.5, instance, lambda: instance.status_json()["state"] == "ready")
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0


def test_an_xid_that_wants_a_reset_is_69() -> None:
    """By an NVML event: where the kernel's log may not be read, there is no other source."""
    with GpuHost() as host, host.instance(config=OFTEN) as instance:
        watched(instance)
        began = time.monotonic()
        host.stub.event(119)
        assert "Xid 119" in str(ended(instance, 69, "gpu_quarantined"))
        assert time.monotonic() - began < 10
        assert quarantine.read(root_paths(host.root))[uuid(0)].cls == "reset"


def test_an_error_of_the_engine_s_own_work_is_70() -> None:
    with GpuHost() as host, GpuService(host.root / "run/gpu.sock") as service, host.instance(config=OFTEN) as instance:
        instance.wait_ready()
        assert service.has_listener.wait(10)
        worker = instance.engine_process("VLLM::Worker")
        service.tell(of_xid(31, uuid=uuid(0), pci=pci(0), pid=worker.pid, process="VLLM::Worker", at=time.time()))
        assert instance.wait_exit() == 70, instance.describe()
        error = instance.last_json()["error"]
        assert error["code"] == "gpu_xid", error
        assert "Xid 31" in error["what"]
        assert quarantine.read(root_paths(host.root)) == {}


def test_an_error_of_another_process_s_work_is_nothing_to_us() -> None:
    with GpuHost(2) as host, GpuService(host.root / "run/gpu.sock") as service, host.instance(config={**OFTEN, "gpus": ["0"]}) as instance:
        instance.wait_ready()
        assert service.has_listener.wait(10)
        service.tell(of_xid(31, uuid=uuid(0), pci=pci(0), pid=1, process="python3", at=time.time()))
        service.tell(of_xid(79, uuid=uuid(1), pci=pci(1), at=time.time()))
        service.tell(of_xid(63, uuid=uuid(0), pci=pci(0), at=time.time()))
        procs.wait_until("the last of them", lambda: "Xid 63" in instance.log())
        assert "Xid 31" not in instance.log()
        assert "Xid 79" not in instance.log()
        assert instance.status_json()["state"] == "ready"
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0


def test_a_detector_that_only_observes_counts_what_it_would_have_done() -> None:
    config = {**OFTEN, "watch": {"observe": ["gpu_lost"]}}
    with GpuHost() as host, host.instance(config=config) as instance:
        watched(instance)
        host.stub.gpu(0, fails=15)
        procs.wait_until("the would-be verdict", lambda: "would end the instance (gpu_lost only observes)" in instance.log())
        assert instance.status_json()["state"] == "ready"
        assert quarantine.read(root_paths(host.root)) == {}
        host.stub.gpu(0, fails=None)
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0


def test_a_driver_that_hangs_ends_no_engine_and_holds_no_stop_up() -> None:
    with GpuHost() as host, host.instance(config={**OFTEN, "preflight": {"gpu_timeout_s": 1.5}}) as instance:
        watched(instance)
        host.stub.set(hang="nvmlDeviceGetTemperature")
        procs.wait_until("the finding", lambda: "nvmlDeviceGetTemperature" in instance.log())
        assert instance.status_json()["state"] == "ready"
        began = time.monotonic()
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 75
        assert time.monotonic() - began < 10
        assert instance.last_json()["error"]["code"] == "gpu_driver_hung"


def test_the_sampler_of_its_own_ends_with_the_instance_however_that_ends() -> None:
    with GpuHost() as host, host.instance(config=OFTEN, cgroup=True) as instance:
        watched(instance)
        sampler = procs.wait_until("the sampler", lambda: [each for each in procs.processes() if each.ppid == instance.pid and "vllmd.gpu.sampler" in each.cmdline])
        instance.signal(signal.SIGKILL)
        instance.wait_exit()
        procs.wait_until("its end", lambda: not procs.is_alive(sampler[0].pid))
