"""gpu.sock as it must not be: whoever answers there, the subscription goes on, by a service that is better or by a child of our own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.component.test_gpu_client import Heard, listening
from tests.fakes.nvml import Stub, uuid
from vllmd.config.paths import Paths, root_paths
from vllmd.core.gpu_findings import of_xid
from vllmd.gpu.client import Client
from vllmd.models import demo

pytestmark = pytest.mark.component

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
FINDING = of_xid(31, uuid=uuid(0), at=1e9).as_dict()


def line(**words: object) -> bytes:
    return json.dumps(words).encode() + b"\n"


@contextmanager
def served(paths: Paths, *answers: Callable[[socket.socket], None]) -> Iterator[list[bytes]]:
    """The nth connection gets the nth answer, the last one all that follow. What each asked."""
    paths.runtime.mkdir(parents=True, exist_ok=True)
    asked: list[bytes] = []
    links: list[socket.socket] = []
    threads: list[threading.Thread] = []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(paths.gpu_socket))
    server.listen()

    def answer(link: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            link.settimeout(10)
            asked.append(link.recv(4096))
            answers[min(number, len(answers) - 1)](link)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = server.accept()
                links.append(link)
                threads.append(threading.Thread(target=answer, args=(link, len(links) - 1)))
                threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield asked
    finally:
        server.shutdown(socket.SHUT_RDWR)
        acceptor.join()
        for link in links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for link in (*links, server):
            link.close()


def says(*pieces: bytes, then_close: bool = True) -> Callable[[socket.socket], None]:
    def answer(link: socket.socket) -> None:
        for piece in pieces:
            link.sendall(piece)
        if then_close:
            link.shutdown(socket.SHUT_RDWR)

    return answer


GOOD = says(HEAD + line(snapshot={"schema": 1, "source": "nvml", "at": 1e9, "gpus": []}) + line(finding=FINDING), then_close=False)

BAD = {
    "nothing": says(),
    "half a head": says(b"HTTP/1.1 200 OK\r\nCont"),
    "no head but bytes": says(b"x" * (5 << 20)),
    "a line without end": says(HEAD + b'{"finding": "' + b"x" * (5 << 20)),
    "garbage": says(HEAD + b"\xff\xfe{]\n\n[]\nnull\n" + b"[" * 100_000 + b"\n"),
    "a finding at infinity": says(HEAD + b'{"finding": ' + json.dumps(FINDING | {"at": float("inf"), "xid": 13}).encode() + b"}\n"),
    "a finding at a number too long for a float": says(HEAD + b'{"finding": ' + json.dumps(FINDING | {"at": 10**400, "xid": 13}).encode() + b"}\n"),
    "a snapshot at infinity": says(HEAD + b'{"snapshot": {"schema": 1, "gpus": [], "at": Infinity}}\n'),
    "a snapshot at nan": says(HEAD + b'{"snapshot": {"schema": 1, "gpus": [], "at": NaN}}\n'),
    "a snapshot in the far future": says(HEAD + b'{"snapshot": {"schema": 1, "gpus": [], "at": 1e300}}\n'),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_one_service_says_does_not_deafen_us_to_the_next(stub: Stub, tmp_path: Path, bad: str) -> None:
    paths = root_paths(tmp_path)
    with served(paths, BAD[bad], GOOD) as asked:

        async def body(heard: Heard) -> None:
            await heard.until("the good finding", lambda: [each for each in heard.findings if each.xid == 31])
            assert heard.client.source == "host"
            assert not [each for each in heard.findings if each.xid == 13]

        listening(paths, body)
    assert b"inf" not in asked[1]
    assert b"nan" not in asked[1]


def test_a_service_that_talks_nonsense_for_ever_is_no_help(stub: Stub, tmp_path: Path) -> None:
    def babble(link: socket.socket) -> None:
        link.sendall(HEAD)
        while True:
            link.sendall(b"{}\n")
            threading.Event().wait(0.2)

    paths = root_paths(tmp_path)
    with served(paths, babble):

        async def body(heard: Heard) -> None:
            await heard.until("a watch of our own", lambda: heard.client.source == "own" and heard.snapshots and heard.snapshots[-1]["gpus"], 20)
            stub.event(79)
            await heard.until("the finding", lambda: [each for each in heard.findings if each.xid == 79])

        listening(paths, body)


def test_the_same_finding_is_told_once_although_two_services_say_it(stub: Stub, tmp_path: Path) -> None:
    """A service that was killed before it noted how far it had read says it again; what comes later is another one."""
    again, later = FINDING | {"at": 1e9 + 0.4}, FINDING | {"at": 1e9 + 30, "xid": 31}
    other = FINDING | {"at": 1e9 + 0.1, "pid": 7}
    paths = root_paths(tmp_path)
    with served(paths, says(HEAD + line(finding=FINDING)), says(HEAD + line(finding=again) + line(finding=other) + line(finding=later), then_close=False)):

        async def body(heard: Heard) -> None:
            await heard.until("the last", lambda: [each for each in heard.findings if each.at == 1e9 + 30])
            assert [(each.pid, each.at) for each in heard.findings] == [(0, 1e9), (7, 1e9 + 0.1), (0, 1e9 + 30)]

        listening(paths, body)


def test_a_reader_that_ends_by_an_error_ends_the_stream(stub: Stub, tmp_path: Path) -> None:
    async def body(heard: Heard) -> None:
        async def broken() -> None:
            raise RuntimeError("broken")

        heard.client._from_host = broken  # type: ignore[method-assign]
        task = asyncio.create_task(heard.read())
        await asyncio.wait([task], timeout=5)
        assert task.done()

    asyncio.run(_alone(tmp_path, body))


async def _alone(tmp_path: Path, body: Callable[[Heard], object]) -> None:
    client = Client(root_paths(tmp_path), retry_s=0.1)
    result = body(Heard(client))
    assert asyncio.iscoroutine(result)
    await result
    await client.close()


def about(**words: object) -> Callable[[socket.socket], None]:
    gpu = {"uuid": "GPU-1", "index": 0, "name": "x", "memory_total_mib": 24000, "memory_free_mib": 23000, **words}
    return says(b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps({"schema": 1, "source": "nvml", "at": 1e9, "gpus": [gpu]}).encode())


STRANGE = {
    "memory of nan": about(memory_total_mib=float("nan")),
    "memory without bound": about(memory_total_mib=10**400, memory_free_mib=float("inf")),
    "memory below nothing": about(memory_total_mib=-1, memory_free_mib=-1),
    "words of another kind": about(name=[], index={}, uuid=None, mig={"uuid": 7}, compute_capability=True),
    "escapes": about(name="x\x1b]0;title\x07\x1b[2J", index="\x1b[2J"),
}


def test_check_bears_whatever_the_service_says(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    paths.config.mkdir(parents=True)
    engine = tmp_path / "vllm"
    engine.write_text("#!/bin/sh\n")
    engine.chmod(0o755)
    (paths.config / "demo.yaml").write_text(json.dumps({"model": {"path": str(demo.make(tmp_path / "model"))}, "engine": {"executable": str(engine)}}))
    for name, answer in {**BAD, **STRANGE}.items():
        with served(paths, answer) as asked:
            done = subprocess.run([sys.executable, "-m", "vllmd.cli", "--root", str(tmp_path), "check", "demo"], capture_output=True, text=True, timeout=60, check=False)
        paths.gpu_socket.unlink()
        assert asked, name
        assert done.returncode == 0, (name, done.stderr)
        assert "Traceback" not in done.stderr, name
        assert "\x1b" not in done.stdout + done.stderr, name
