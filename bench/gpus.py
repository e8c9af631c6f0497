"""The watch over GPUs, over the stub of the driver's library: how soon an error is known, and what the watch costs."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from bench.idle import Cost
from bench.place import FLAGS, BenchError, Place
from bench.table import Figure
from tests.fakes.nvml import Stub
from tests.gpu_service import GpuService, Listener
from vllmd.engines import record

XID_BAR_MS = 50.0
STUCK_BAR_S = 0.2
CPU_BAR_PCT = 0.5
MEMORY_BAR_MIB = 64.0
XIDS = 100
GPUS = 8
WINDOW_S = 60.0
SETTLE_S = 6.0


def run() -> list[Figure]:
    return [*_xids(), _stuck(), *_costs()]


def _xids() -> list[Figure]:
    """From the kernel's line, or the driver's event, to the verdict at a client of gpu.sock."""
    with GpuService(2) as service:
        listener = service.listen()
        listener.snapshot(lambda found: bool(found["gpus"]))
        kernel = [_one_xid(service, listener, pid) for pid in range(1, XIDS + 1)]
    with GpuService(2, kmsg="/nowhere") as service:
        listener = service.listen()
        listener.snapshot(lambda found: bool(found["gpus"]))
        events = [_one_event(service, listener) for _ in range(5)]
    return [
        Figure("Xid in the kernel's log to its verdict at an instance", kernel, "ms", XID_BAR_MS, judged="p99", against="DCGM's health watch: 30 s by default"),
        Figure("  as NVML's event alone", events, "ms", XID_BAR_MS, judged="p99", against="without the process that caused it"),
    ]


def _one_xid(service: GpuService, listener: Listener, pid: int) -> float:
    """Each of another process, so that each is one of its own; nine at most within two seconds."""
    if pid % 8 == 0:
        time.sleep(2.1)
    began = time.monotonic()
    service.log.xid(31, pid=pid)
    return (listener.finding(pid=pid)[0] - began) * 1000


def _one_event(service: GpuService, listener: Listener) -> float:
    time.sleep(2.1)
    seen, began = len(listener.findings), time.monotonic()
    service.stub.event(13)
    while len(listener.findings) == seen:
        time.sleep(0.0005)
        if time.monotonic() - began > 10:
            raise BenchError("an event of the driver was not told")
    return (listener.findings[seen][0] - began) * 1000


def _stuck() -> Figure:
    """With the default of 15 s: how long after its end it is noticed."""
    with GpuService(call_timeout_s=15.0) as service:
        listener = service.listen()
        listener.snapshot(lambda found: bool(found["gpus"]))
        service.stub.set(hang="nvmlDeviceGetTemperature")
        began = time.monotonic()
        told = listener.finding(30.0, detector="gpu_stuck")[0]
    return Figure("driver call that hangs noticed, beyond gpu_watch.call_timeout_s (15 s)", [told - began - 15.0], bar=STUCK_BAR_S, against="NVIDIA's own tools wait 45 s; the call is made up to 0.1 s after it was made to hang")


class _GpuPlace(Place):
    """Its supervisor finds the stub of the driver."""

    def environ(self) -> dict[str, str]:
        return super().environ() | Stub(self.root, GPUS).environ()


def _costs() -> list[Figure]:
    """The host's service with its sampler, and a supervisor with a sampler of its own; each over GPUS GPUs, at the default interval."""
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(GpuService(GPUS, interval_s=5.0, call_timeout_s=15.0))
        service.listen().snapshot(lambda found: bool(found["gpus"]))
        place = stack.enter_context(_GpuPlace(config={"gpus": "all", "preflight": {"gpu_min_free": "0"}}))
        record.write(place.root / "engines" / "vllm-0.32.0-bench", record.Record("0.32.0", "cuda", FLAGS, FLAGS[:1]))
        place.start()
        place.ready_at()
        pairs = {"vllmd-gpu.service": service.pid, "supervisor": place.pid}
        time.sleep(SETTLE_S)
        costs = {name: (Cost(pid), Cost(_sampler(pid))) for name, pid in pairs.items()}
        for each in (cost for pair in costs.values() for cost in pair):
            each.begin()
        began = time.monotonic()
        time.sleep(WINDOW_S)
        for each in (cost for pair in costs.values() for cost in pair):
            each.end(time.monotonic() - began)
        place.stop()
    figures = []
    for name, (main, sampler) in costs.items():
        parts = f"{GPUS} GPUs; {name} {main.memory_mib:.1f} MiB, {main.cpu_pct:.3f} %; sampler {sampler.memory_mib:.1f} MiB, {sampler.cpu_pct:.3f} %"
        figures += [
            Figure(f"{name} and its sampler: private memory", [main.memory_mib + sampler.memory_mib], "MiB", MEMORY_BAR_MIB, against=parts),
            Figure(f"  CPU over {WINDOW_S:g} s, of one core", [main.cpu_pct + sampler.cpu_pct], "%", CPU_BAR_PCT, against="every 5 s"),
        ]
    return figures


def _sampler(parent: int) -> int:
    """The child of `parent` that samples."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                if b"vllmd.gpu.sampler" in file.read():
                    return int(pid)
        time.sleep(0.05)
    raise BenchError(f"process {parent} has no sampler")
