"""The kernel's log: a storm of errors, records that are cut, and a reader that is refused."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests import procs
from tests.fakes.nvml import pci, uuid
from tests.gpu_service import GpuService
from vllmd.gpu.kmsg import Kmsg, Line
from vllmd.system.host import cpu_seconds, private_memory_bytes

pytestmark = pytest.mark.component

STORM = 800_000
DISTINCT = 29


def storm(lines: int) -> bytes:
    """As a driver in trouble writes it: few errors, over and over, each with a time of its own."""
    now = int(time.monotonic() * 1e6)
    kinds = [f"NVRM: Xid (PCI:{pci(0)}): {number}, pid=5, name=python3, Ch {number:08x}" for number in (13, 31, 43, 45, 63, 92, 121, *range(126, 136), 8, 11, 25, 32, 39, 40, 41, 68, 69, 70, 71, 80)]
    assert len(set(kinds)) >= DISTINCT - 4
    kinds += [f"NVRM: Xid (PCI:{pci(1)}): {number}, pid=6, name=python3" for number in (13, 31, 43, 45)]
    return "".join(f"4,{number},{now + number},-;{kinds[number % DISTINCT]}\n" for number in range(lines)).encode()


def test_a_storm_neither_delays_nor_grows_the_watch() -> None:
    with GpuService(2) as service:
        listener = service.listen()
        listener.snapshot(lambda found: bool(found["gpus"]))
        data = storm(STORM)
        service.log.write(storm(2000))  # what the first lines cost, once
        before, cpu = private_memory_bytes(service.pid), cpu_seconds(service.pid)
        started = time.monotonic()
        thread = threading.Thread(target=service.log.write, args=(data,))
        thread.start()
        thread.join(120)
        procs.wait_until("all of them", lambda: f"kernel_records_total {STORM + 2000}".encode() in service.ask("/metrics"), 60, 0.2)
        took = time.monotonic() - started
        spent = cpu_seconds(service.pid) - cpu
        grown = private_memory_bytes(service.pid) - before
        print(f"{STORM} lines in {took:.1f} s, {spent:.1f} s of CPU, {grown >> 10} KiB more, {len(listener.findings)} findings")
        at = time.monotonic()
        service.log.xid(79, 1)
        told, _ = listener.finding(xid=79)
        assert told - at < 0.5
        assert grown < 4 << 20
        assert spent < 30
        counts = Counter((finding["uuid"], finding["xid"]) for _, finding in listener.findings)
        assert set(counts) <= {(uuid(index), number) for index in (0, 1) for number in range(200)}
        assert max(counts.values()) <= took / 2 + 3, "each at most once in two seconds"


def test_the_loop_has_its_turn_during_a_storm(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    seen: list[Line] = []
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        log = Kmsg(lambda line, _at: seen.append(line), tmp_path / "log")
        assert log.start(asyncio.get_running_loop())
        data = storm(50_000)
        writer = asyncio.get_running_loop().run_in_executor(None, _write, tmp_path / "log", data)
        while log.records < 50_000:
            before = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - before)
        await writer
        log.close()

    asyncio.run(asyncio.wait_for(watch(), 30))
    assert len(seen) == 50_000
    assert longest < 0.25


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as pipe:
        pipe.write(data)


def heard(tmp_path: Path, *pieces: bytes) -> list[Line]:
    """What is made of these pieces, each read by itself."""
    os.mkfifo(tmp_path / "log")
    seen: list[Line] = []

    async def run() -> None:
        log = Kmsg(lambda line, _at: seen.append(line), tmp_path / "log")
        assert log.start(asyncio.get_running_loop())
        fd = os.open(tmp_path / "log", os.O_WRONLY)
        try:
            for piece in pieces:
                os.write(fd, piece)
                await asyncio.sleep(0.01)
            before = log.records
            os.write(fd, b"6,9,999999999999,-;last\n")
            while log.records == before:
                await asyncio.sleep(0.001)
        finally:
            os.close(fd)
            log.close()

    asyncio.run(asyncio.wait_for(run(), 10))
    return seen


def test_a_record_that_comes_in_pieces_is_one(tmp_path: Path) -> None:
    record = f"4,1,1000000,-;NVRM: Xid (PCI:{pci(0)}): 79, x\n SUBSYSTEM=pci\n DEVICE=+pci:0000:10:00.0\n".encode()
    assert [line.xid for line in heard(tmp_path, record[:20], record[20:50], record[50:])] == [79]


@pytest.mark.parametrize("piece", [b"\n\n\n", b"NVRM: Xid (PCI:0000:10:00): 79\n", b"4;NVRM: Xid\n", b"x" * 60_000 + b"NVRM\n", b"\xff\xfe NVRM \0\n", b"4,1,99999999999999999999999999,-;NVRM: Xid (PCI:0000:10:00): 79\n"])
def test_what_is_no_record_is_passed_over(tmp_path: Path, piece: bytes) -> None:
    good = f"4,1,1000000,-;NVRM: Xid (PCI:{pci(0)}): 31\n".encode()
    assert [line.xid for line in heard(tmp_path, piece, good)] == [31]


def test_a_log_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    async def run() -> str:
        log = Kmsg(lambda _line, _at: None, tmp_path / "absent")
        assert not log.start(asyncio.get_running_loop())
        log.close()
        return log.refused

    assert asyncio.run(run()) == f"{tmp_path}/absent: No such file or directory"


def test_the_kernel_s_own_log_is_read_where_it_may_be() -> None:
    async def run() -> tuple[bool, str, int]:
        log = Kmsg(lambda _line, _at: None)
        started = log.start(asyncio.get_running_loop())
        for _ in range(100):
            await asyncio.sleep(0)
        log.close()
        return started, log.refused, log.records

    started, refused, records = asyncio.run(run())
    assert (started and records > 0) or refused
