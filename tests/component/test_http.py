"""One request to an engine, against real sockets that refuse, stall, break, lie and flood."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from vllmd.core.plan import Endpoint
from vllmd.system.http import Answer, request
from vllmd.system.unixpath import short

pytestmark = pytest.mark.component

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextlib.asynccontextmanager
async def serving(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[Endpoint]:
    tasks: set[asyncio.Task[None]] = set()

    async def wrapped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError, asyncio.IncompleteReadError):
            await handler(reader, writer)
        writer.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(wrapped(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, host, 0)
    try:
        yield Endpoint("tcp", host=host, port=server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def ask(handler: Handler, *, timeout_s: float = 5.0, limit_bytes: int = 1 << 20, body: bytes = b"", host: str = "127.0.0.1") -> Answer:
    async def scenario() -> Answer:
        async with serving(handler, host) as endpoint:
            method = "POST" if body else "GET"
            return await request(endpoint, method, "/health", body=body, timeout_s=timeout_s, limit_bytes=limit_bytes)

    return asyncio.run(scenario())


async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(data)
    await writer.drain()


def replying(data: bytes) -> Handler:
    return lambda reader, writer: reply(reader, writer, data)


def test_an_answer_with_its_status_and_body() -> None:
    answer = ask(replying(OK))
    assert (answer.outcome, answer.status, answer.body) == ("answered", 200, b"ok")
    assert 0 < answer.elapsed_s < 5


def test_503_is_an_answer() -> None:
    assert ask(replying(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n")).status == 503


def test_a_body_and_headers_arrive() -> None:
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(4))
        writer.write(OK)
        await writer.drain()

    assert ask(handler, body=b"ping").status == 200
    assert seen[0].startswith(b"POST /health HTTP/1.1\r\n")
    assert b"content-length: 4\r\n" in seen[0].lower()
    assert seen[0].endswith(b"ping")


def test_ipv6_and_chunked() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    assert ask(replying(chunked), host="::1").body == b"abc"


def test_an_old_server_that_ends_its_body_by_closing() -> None:
    assert ask(replying(b"HTTP/1.0 200 OK\r\n\r\nuntil the end")).body == b"until the end"


def test_nobody_listens_is_refused() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound and not listening, as vLLM while it loads
        endpoint = Endpoint("tcp", host="127.0.0.1", port=bound.getsockname()[1])
        assert asyncio.run(request(endpoint, "GET", "/", timeout_s=5)).outcome == "refused"


def test_a_socket_file_that_is_absent_or_stale_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    endpoint = Endpoint("uds", path=str(path))
    assert asyncio.run(request(endpoint, "GET", "/", timeout_s=5)).outcome == "refused"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    assert asyncio.run(request(endpoint, "GET", "/", timeout_s=5)).outcome == "refused"


def test_silence_is_a_timeout() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    started = time.monotonic()
    answer = ask(silent, timeout_s=0.2)
    assert answer.outcome == "timeout"
    assert time.monotonic() - started < 2


def test_a_trickle_is_a_timeout_too() -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    assert ask(trickle, timeout_s=0.3).outcome == "timeout"


def test_a_full_backlog_of_a_unix_socket_is_slow_and_not_broken(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(str(path))
        listener.listen(0)
        other.connect(str(path))
        assert asyncio.run(request(Endpoint("uds", path=str(path)), "GET", "/", timeout_s=0.2)).outcome == "timeout"


def test_a_reset_before_and_within_the_answer() -> None:
    def resetting(data: bytes) -> Handler:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reply(reader, writer, data)
            link = writer.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        return handler

    assert ask(resetting(b"")).outcome == "reset"
    assert ask(resetting(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")).outcome in ("reset", "invalid")


def test_closed_without_an_answer_is_a_reset() -> None:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    assert ask(closing).outcome == "reset"


@pytest.mark.parametrize("data", [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"\x00\xff" * 100 + b"\r\n\r\n", b"A" * 200_000])
def test_what_is_not_http_is_invalid(data: bytes) -> None:
    assert ask(replying(data)).outcome == "invalid"


def test_a_huge_body_is_cut_off_and_invalid() -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    answer = ask(flood, limit_bytes=1 << 20)
    assert answer.outcome == "invalid"
    assert answer.body == b""


def test_no_time_wait_is_left_on_the_servers_port() -> None:
    async def scenario() -> int:
        async with serving(replying(OK)) as endpoint:
            for _ in range(20):
                assert (await request(endpoint, "GET", "/", timeout_s=5)).status == 200
            return endpoint.port

    port = asyncio.run(scenario())
    with socket.socket() as exclusive:
        exclusive.bind(("127.0.0.1", port))  # no SO_REUSEADDR: EADDRINUSE if a remnant is there


def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 100) / ("e" * 100) / "engine.sock"
    path.parent.mkdir(parents=True)

    async def scenario() -> Answer:
        listener = socket.socket(socket.AF_UNIX)
        with short(path) as name:
            listener.bind(name)
        server = await asyncio.start_unix_server(replying(OK), sock=listener)
        async with server:
            return await request(Endpoint("uds", path=str(path)), "GET", "/health", timeout_s=5)

    assert asyncio.run(scenario()).status == 200


@pytest.mark.parametrize("piece", [b"HTTP/1.1 100 Continue\r\n\r\n", b"1\r\nx\r\n"], ids=["interim answers", "chunks of a byte"])
def test_an_answer_without_end_is_cut_off_and_stops_no_other_task(piece: bytes) -> None:
    """A sender that is always ahead of us: what reads it must give the loop its turns, and come to an end."""
    give_up = time.monotonic() + 30

    def flood(listener: socket.socket) -> None:
        connection = listener.accept()[0]
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" if piece[:1] == b"1" else b"")
            while time.monotonic() < give_up:
                connection.sendall(piece * 10_000)

    async def scenario(port: int) -> tuple[Answer, float]:
        turns, longest = time.monotonic(), 0.0
        asked = asyncio.create_task(request(Endpoint("tcp", host="127.0.0.1", port=port), "GET", "/", timeout_s=60))
        while not asked.done():
            await asyncio.sleep(0)
            turns, longest = time.monotonic(), max(longest, time.monotonic() - turns)
        return await asked, longest

    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = threading.Thread(target=flood, args=(listener,))
        sender.start()
        answer, longest = asyncio.run(scenario(listener.getsockname()[1]))
        sender.join()
    assert answer.outcome == "invalid", answer
    assert time.monotonic() < give_up
    assert longest < 3
