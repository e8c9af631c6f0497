"""No finding is lost between the kernel's log and the quarantine, and none told twice: a service that is killed, a disk that hangs, a storm."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import procs
from tests.component.gpu_hosts import RESERVED_MIB, TOTAL_MIB, GpuHost
from tests.fakes.nvml import pci, uuid
from tests.gpu_service import GpuService
from vllmd.config.paths import Paths, root_paths
from vllmd.config.settings import GpuWatch
from vllmd.gpu import quarantine
from vllmd.gpu import watch as watching
from vllmd.gpu.client import Client
from vllmd.gpu.kmsg import Line
from vllmd.gpu.quarantine import Record
from vllmd.gpu.watch import Sources, Watch
from vllmd.instance import gpuwatch
from vllmd.system.host import boot_id

pytestmark = pytest.mark.component


def has_gpus(document: dict[str, Any]) -> bool:
    return bool(document["gpus"])


def quarantined(service: GpuService) -> dict[str, Record]:
    return quarantine.read(service.paths)


class TestTheKernelsLog:
    @pytest.mark.parametrize("ahead_s", [-0.05, 3600.0, 9e9])
    def test_records_out_of_the_order_of_their_times_all_count(self, ahead_s: float) -> None:
        """Each processor has a clock of its own, and printk takes the time before it takes its place."""
        with GpuService() as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.log.xid(63, at=time.monotonic() + ahead_s)
            listener.finding(xid=63)
            service.log.xid(92, at=time.monotonic() - 0.1)
            listener.finding(xid=92)
            time.sleep(1.2)  # the position is noted
            assert service.stop() == 0
            service.start()
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.log.xid(121)
            listener.finding(xid=121)

    def test_a_clock_of_the_kernel_s_that_has_drifted_does_not_make_new_lines_old(self) -> None:
        """printk's clock is not corrected by NTP: after a year it is minutes from CLOCK_MONOTONIC."""
        with GpuService() as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.log.xid(31, pid=5, at=max(1.0, time.monotonic() - 200))
            at = listener.finding(xid=31)[1]["at"]
            assert abs(time.time() - at) < 5

    def test_a_bogus_position_deafens_nobody(self) -> None:
        with GpuService(start=False) as service:
            service.paths.runtime.mkdir(exist_ok=True)
            (service.paths.runtime / "gpu-kmsg.json").write_text(json.dumps({"boot_id": boot_id(), "sequence": 1 << 62, "written": 9e9}))
            service.start()
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.log.xid(79)
            listener.finding(xid=79)

    def test_what_came_first_is_not_pushed_out_by_a_storm_before_the_first_snapshot(self) -> None:
        with GpuService(call_timeout_s=20, start=False) as service:
            service.stub.set(hang="nvmlInit")
            service.start()
            service.log.xid(79)
            for number in range(3000):
                service.log.xid(31, pid=number + 1)
            procs.wait_until("the storm", lambda: b"kernel_records_total 600" in service.ask("/metrics"))
            service.stub.set(hang=None)
            assert procs.wait_until("the quarantine", lambda: quarantined(service))[uuid(0)].xid == 79

    def test_what_was_not_told_yet_is_told_by_the_next_service(self) -> None:
        """Killed while the driver hung, before it could say which GPU it was."""
        with GpuService(call_timeout_s=20, start=False) as service:
            service.stub.set(hang="nvmlInit")
            service.start()
            service.log.xid(79)
            procs.wait_until("the line", lambda: b"kernel_records_total 2" in service.ask("/metrics"))
            time.sleep(1.3)  # the position is noted every second
            service.stop(signal.SIGKILL)
            service.stub.set(hang=None)
            service.log.replay()
            service.start()
            procs.wait_until("the quarantine", lambda: quarantined(service))

    def test_a_service_that_is_killed_ten_times_loses_nothing_and_says_nothing_twice(self) -> None:
        numbers = (63, 92, 121, 157, 160, 161, 168, 54, 78, 45)
        with GpuService(3, start=False) as service:
            host = on(service)
            config = {"gpu_watch": {"interval_s": 0.2, "call_timeout_s": 5.0}}
            service.start()
            instances = [host.instance(f"i{index}", {**config, "gpus": [str(index)]}) for index in range(3)]
            try:
                for instance in instances:
                    instance.start()
                for instance in instances:
                    instance.wait_ready()
                for turn, number in enumerate(numbers):
                    procs.wait_until("three listeners", lambda: b"watch_subscribers 3" in service.ask("/metrics"), 20)
                    if turn % 2:
                        for index in range(3):
                            service.log.xid(number, index)
                    service.stop(signal.SIGKILL)
                    if not turn % 2:
                        for index in range(3):
                            service.log.xid(number, index)
                    service.log.replay()
                    service.start()
                    words = f"Xid {number}:"
                    procs.wait_until(words, lambda words=words: all(words in each.log() for each in instances), 20)  # type: ignore[misc]
                told = [{number: instance.log().count(f"Xid {number}:") for number in numbers} for instance in instances]
                samplers = [each for each in procs.processes() if "gpu.sampler" in each.cmdline and each.ppid != service.pid and str(service.stub.path) in str(procs.environ_of(each.pid))]
                for instance in instances:
                    assert instance.status_json()["state"] == "ready"
                    instance.signal(signal.SIGTERM)
                    assert instance.wait_exit() == 0
                assert told == [dict.fromkeys(numbers, 1)] * 3
                assert samplers == []
            finally:
                for instance in instances:
                    instance.close()


def on(service: GpuService) -> GpuHost:
    """Instances on the same host as the service."""
    host = GpuHost.__new__(GpuHost)
    host.root, host.stub = service.root, service.stub
    for index in range(len(service.stub.gpus)):
        service.stub.gpu(index, memory=f"{TOTAL_MIB} {TOTAL_MIB - RESERVED_MIB} {RESERVED_MIB}")
    return host


# -- a disk that hangs, or is full


def watched(paths: Paths, body: Callable[[Watch], Any]) -> list[str]:
    """The watch as the host's service has it, with no sampler; what it says of the quarantine."""
    said: list[str] = []

    async def run() -> None:
        async def forever() -> None:
            await asyncio.Event().wait()

        watch = Watch(paths, GpuWatch(), told=lambda _: None, seen=lambda _: None, sources=Sources(kmsg=""), keeps=True, changed=lambda event, _text, _record: said.append(event))
        watch.sampling.run = forever  # type: ignore[method-assign]
        task = asyncio.create_task(watch.run())
        try:
            await asyncio.wait_for(body(watch), 20)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    return said


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def snapshot() -> dict[str, Any]:
    return {"schema": 1, "source": "nvml", "at": time.time(), "gpus": [{"index": 0, "uuid": uuid(0), "pci": f"{pci(0)}.0"}]}


def xid(watch: Watch, number: int) -> None:
    watch._line(Line(f"{pci(0)}.0", number), time.monotonic())


def test_a_record_is_not_lost_behind_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, free, real = root_paths(tmp_path), threading.Event(), quarantine.read

    def slow(*arguments: Any, **more: Any) -> Any:
        free.wait(20)
        return real(*arguments, **more)

    monkeypatch.setattr(quarantine, "read", slow)

    async def body(watch: Watch) -> None:
        for _ in range(600):
            watch._said({"snapshot": snapshot()})
            await asyncio.sleep(0)
        xid(watch, 79)
        free.set()
        await until(lambda: real(paths))

    watched(paths, body)
    assert real(paths)[uuid(0)].xid == 79


def test_a_record_that_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, real, tries = root_paths(tmp_path), quarantine.add, []

    def full(*arguments: Any, **more: Any) -> Record:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")
        return real(*arguments, **more)

    monkeypatch.setattr(quarantine, "add", full)
    monkeypatch.setattr(watching, "RETRY_S", 0.05)

    async def body(watch: Watch) -> None:
        watch._said({"snapshot": snapshot()})
        xid(watch, 79)
        await until(lambda: quarantine.read(paths))
        await until(lambda: watch.document()["gpus"][0]["quarantine"])

    said = watched(paths, body)
    assert said == ["gpu-quarantine-failed", "gpu-quarantined"], "a full disk is told once"


def test_the_graver_class_is_recorded_although_a_lighter_one_has_just_been(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    gpuwatch._add(paths, Record(uuid(0), "reset", 48, "one", last_at=1e9))
    gpuwatch._add(paths, Record(uuid(0), "reset", 48, "one", last_at=1e9 + 1))
    gpuwatch._add(paths, Record(uuid(0), "reboot", 79, "two", last_at=1e9 + 1))
    record = quarantine.read(paths)[uuid(0)]
    assert (record.cls, record.xid, record.count) == ("reboot", 79, 2)


def test_a_time_far_in_the_future_keeps_nobody_from_recording(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    quarantine.add(paths, Record(uuid(0), "reset", 48, "one", last_at=time.time() + 1e9))
    gpuwatch._add(paths, Record(uuid(0), "reset", 119, "two", last_at=time.time()))
    assert quarantine.read(paths)[uuid(0)].xid == 119


def test_since_when_a_watch_of_our_own_reads(tmp_path: Path) -> None:
    """What the kernel said between the last word of the service and our own watch is not lost."""
    client = Client(root_paths(tmp_path))
    now = time.monotonic()
    assert abs(client._since() - now) < 1
    client._heard_mono = now - 7
    assert 5 < now - client._since() < 15
