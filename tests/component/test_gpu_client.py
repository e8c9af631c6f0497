"""An instance's subscription: from the host's service, from a child of its own where that is not there, and back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests import procs
from tests.fakes.nvml import Stub, uuid
from tests.gpu_service import GpuService
from vllmd.config.paths import Paths, root_paths
from vllmd.config.settings import GpuWatch
from vllmd.core.gpu_findings import Finding
from vllmd.gpu import quarantine
from vllmd.gpu.client import Client, read_once
from vllmd.gpu.quarantine import Record
from vllmd.gpu.watch import Sources

pytestmark = pytest.mark.component

QUICK = GpuWatch(interval_s=0.1, call_timeout_s=1.0)


class Heard:
    """What a client's stream gave so far."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.findings: list[Finding] = []
        self.snapshots: list[dict[str, Any]] = []

    async def read(self) -> None:
        async for said in self.client.stream():
            if isinstance(said, Finding):
                self.findings.append(said)
            else:
                self.snapshots.append(said)

    async def until(self, what: str, condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not in time: {what}; {self.findings} {self.snapshots[-1:]}"
            await asyncio.sleep(0.01)


def listening(paths: Paths, body: Callable[[Heard], Awaitable[None]], settings: GpuWatch = QUICK, kmsg: str = "", retry_s: float = 0.1) -> None:
    async def run() -> None:
        client = Client(paths, settings, sources=Sources(kmsg=kmsg, drm="/nowhere"), retry_s=retry_s)
        heard = Heard(client)
        task = asyncio.create_task(heard.read())
        try:
            await body(heard)
        finally:
            await client.close()
            await asyncio.wait([task], timeout=5)
            assert task.done()

    asyncio.run(run())


def test_from_the_host_s_service() -> None:
    with GpuService() as service:

        async def body(heard: Heard) -> None:
            await heard.until("a snapshot", lambda: heard.snapshots and heard.snapshots[-1]["gpus"])
            assert heard.client.source == "host"
            service.log.xid(31, pid=5)
            await heard.until("the finding", lambda: heard.findings)
            assert (heard.findings[0].xid, heard.findings[0].uuid, heard.findings[0].pid) == (31, uuid(0), 5)

        listening(service.paths, body)
        assert [each.pid for each in procs.processes() if each.ppid == os.getpid() and "sampler" in each.cmdline] == []


def test_without_it_a_child_of_its_own_and_the_service_when_it_is_there(stub: Stub, tmp_path: Path) -> None:
    with GpuService(start=False) as service:

        async def body(heard: Heard) -> None:
            await heard.until("a snapshot", lambda: heard.snapshots and heard.snapshots[-1]["gpus"])
            assert heard.client.source == "own"
            stub.event(79)
            await heard.until("the finding", lambda: heard.findings)
            assert (heard.findings[0].xid, heard.findings[0].uuid) == (79, uuid(0))
            assert quarantine.read(service.paths) == {}, "the instance itself decides what to record"
            await asyncio.to_thread(service.start)
            await heard.until("the host", lambda: heard.client.source == "host")
            procs.wait_until("the end of the child", lambda: not [each for each in procs.processes() if each.ppid == os.getpid() and "sampler" in each.cmdline])
            await asyncio.to_thread(service.stop)
            await heard.until("its own again", lambda: heard.client.source == "own")
            before = len(heard.snapshots)
            await heard.until("snapshots of it", lambda: len(heard.snapshots) > before + 2)

        listening(service.paths, body)


def test_a_restart_of_the_service_loses_no_finding(stub: Stub) -> None:
    with GpuService() as service:

        async def body(heard: Heard) -> None:
            await heard.until("a snapshot", lambda: heard.snapshots and heard.snapshots[-1]["gpus"])
            await asyncio.to_thread(service.stop)
            service.log.xid(31, pid=5)
            await asyncio.to_thread(service.start)
            await heard.until("the finding", lambda: heard.findings)
            assert (heard.findings[0].xid, heard.client.source) == (31, "host")

        listening(service.paths, body)


def test_a_service_that_hangs_is_no_help(stub: Stub) -> None:
    with GpuService() as service:
        service.listen().snapshot(lambda found: bool(found["gpus"]))
        os.kill(service.pid, signal.SIGSTOP)

        async def body(heard: Heard) -> None:
            await heard.until("its own", lambda: heard.client.source == "own" and heard.snapshots, 20)
            os.kill(service.pid, signal.SIGCONT)
            await heard.until("the host", lambda: heard.client.source == "host", 20)

        listening(service.paths, body)


def test_a_hang_in_the_driver_is_noticed_by_its_own_watch_too(stub: Stub, tmp_path: Path) -> None:
    async def body(heard: Heard) -> None:
        await heard.until("a snapshot", lambda: heard.snapshots and heard.snapshots[-1]["gpus"])
        stub.set(hang="nvmlDeviceGetPowerUsage")
        await heard.until("the finding", lambda: heard.findings)
        assert heard.findings[0].detector == "gpu_stuck"
        await heard.until("the document", lambda: heard.snapshots[-1]["stuck_in"].startswith("nvmlDeviceGetPowerUsage"))
        stub.set(hang=None)
        await heard.until("the driver back", lambda: not heard.snapshots[-1]["stuck_in"])

    listening(root_paths(tmp_path), body)


def test_close_in_the_middle_of_anything_leaves_nothing(stub: Stub, tmp_path: Path) -> None:
    for wait_s in (0.0, 0.05, 0.2, 0.6):

        async def body(heard: Heard, wait_s: float = wait_s) -> None:
            await asyncio.sleep(wait_s)

        listening(root_paths(tmp_path), body)


class TestOnce:
    def test_from_the_service(self) -> None:
        with GpuService(2) as service:
            service.listen().snapshot(lambda found: len(found["gpus"]) == 2)
            start = time.monotonic()
            found = read_once(service.paths, 10)
            assert [gpu["uuid"] for gpu in found["gpus"]] == [uuid(0), uuid(1)]
            assert time.monotonic() - start < 8

    def test_from_a_child_with_verdict_and_quarantine(self, stub: Stub, tmp_path: Path) -> None:
        paths = root_paths(tmp_path)
        quarantine.add(paths, Record(uuid(0), "reset", 48, "why", "do"))
        [gpu] = read_once(paths, 20)["gpus"]
        assert gpu["verdict"] == {"class": "reset", "what": "why", "hint": "do"}
        assert gpu["quarantine"]["xid"] == 48

    def test_a_hang_ends_at_the_deadline_and_is_named(self, stub: Stub, tmp_path: Path) -> None:
        stub.set(hang="nvmlDeviceGetName")
        start = time.monotonic()
        found = read_once(root_paths(tmp_path), 2.0)
        assert 1.5 < time.monotonic() - start < 4
        assert found["stuck_in"] == f"nvmlDeviceGetName {uuid(0)}"

    def test_without_a_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
        found = read_once(root_paths(tmp_path), 20)
        assert (found["source"], found["gpus"], found["stuck_in"]) == ("none", [], "")

    @pytest.mark.parametrize("answer", [b"", b"nonsense", b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, b'HTTP/1.1 200 OK\r\n\r\n{"schema": 2, "gpus": []}', b'HTTP/1.1 500 No\r\n\r\n{"schema": 1, "gpus": []}'])
    def test_an_answer_that_makes_no_sense_is_none(self, stub: Stub, tmp_path: Path, answer: bytes) -> None:
        paths = root_paths(tmp_path)
        paths.runtime.mkdir()
        script = f"""
import socket, sys
s = socket.socket(socket.AF_UNIX); s.bind({str(paths.gpu_socket)!r}); s.listen(); print("up", flush=True)
c, _ = s.accept(); c.recv(4096); c.sendall({answer!r}); c.close()
"""
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            server.stdout.readline()
            assert read_once(paths, 20)["gpus"][0]["uuid"] == uuid(0)

    def test_a_server_that_never_answers_costs_no_more_than_its_time(self, stub: Stub, tmp_path: Path) -> None:
        paths = root_paths(tmp_path)
        paths.runtime.mkdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(str(paths.gpu_socket))
            server.listen()
            start = time.monotonic()
            assert read_once(paths, 3)["stuck_in"] == "the sampler itself"
            assert time.monotonic() - start < 5
