"""The control socket: its answers, and clients that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vllmd.core.plan import Endpoint
from vllmd.errors import TryLater, VllmdError
from vllmd.system import control as control_module
from vllmd.system.control import CONNECTIONS_MAX, ControlServer
from vllmd.system.http import Answer, request
from vllmd.system.peer import Peer

pytestmark = pytest.mark.component


def broken() -> tuple[str, bytes]:
    raise RuntimeError("a bug of ours")


@contextlib.asynccontextmanager
async def control(path: Path, timeout_s: float = 5.0, size: int = 10) -> AsyncIterator[ControlServer]:
    routes = {"/status": lambda: ("application/json", b"x" * size), "/broken": broken}
    server = ControlServer(path, routes, timeout_s=timeout_s)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def get(path: Path, target: str = "/status", method: str = "GET", limit_bytes: int = 1 << 20) -> Answer:
    return await request(Endpoint("uds", path=str(path)), method, target, timeout_s=5, limit_bytes=limit_bytes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def test_routes_methods_and_bugs(path: Path) -> None:
    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        async with control(path):
            assert (await get(path)).body == b"x" * 10
            assert (await get(path, "/status?a=b")).status == 200
            assert (await get(path, "/other")).status == 404
            assert (await get(path, method="POST")).status == 405
            assert (await get(path, "/broken")).status == 500
            assert path.stat().st_mode & 0o777 == 0o660
        assert not path.exists()

    asyncio.run(scenario())


def test_garbage_and_endless_headers_get_400_and_the_server_lives(path: Path) -> None:
    async def scenario() -> None:
        async with control(path):
            for data in (b"\x00\x01\x02\r\n\r\n", b"GET /status HTTP/1.1\r\n" + b"x: y\r\n" * 10_000):
                reader, writer = await asyncio.open_unix_connection(str(path))
                with contextlib.suppress(OSError):
                    writer.write(data)
                    await writer.drain()
                    assert (await reader.read(1000)).startswith(b"HTTP/1.1 400")
                writer.transport.abort()
            assert (await get(path)).status == 200

    asyncio.run(scenario())


def test_clients_that_send_nothing_are_cut_off(path: Path) -> None:
    async def scenario() -> None:
        async with control(path, timeout_s=0.2):
            silent = [await asyncio.open_unix_connection(str(path)) for _ in range(CONNECTIONS_MAX)]
            deadline = time.monotonic() + 5
            while (await get(path)).outcome != "answered":
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            for reader, writer in silent:
                with contextlib.suppress(OSError):
                    assert await reader.read() == b""
                writer.transport.abort()

    asyncio.run(scenario())


def test_more_clients_than_places_are_turned_away_at_once(path: Path) -> None:
    async def scenario() -> None:
        async with control(path, timeout_s=60):
            silent = [await asyncio.open_unix_connection(str(path)) for _ in range(CONNECTIONS_MAX)]
            started = time.monotonic()
            assert (await get(path)).outcome == "reset"
            assert time.monotonic() - started < 3
            for _, writer in silent:
                writer.transport.abort()

    asyncio.run(scenario())


def test_a_client_that_never_reads_blocks_nobody(path: Path) -> None:
    async def scenario() -> None:
        async with control(path, timeout_s=0.3, size=5_000_000) as server:
            _, writer = await asyncio.open_unix_connection(str(path), limit=1)
            writer.write(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
            assert len((await get(path, limit_bytes=6_000_000)).body) == 5_000_000
            deadline = time.monotonic() + 5
            while server._open:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            writer.transport.abort()

    asyncio.run(scenario())


def test_a_stale_socket_file_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def scenario() -> None:
        async with control(path):
            assert (await get(path)).status == 200

    asyncio.run(scenario())


def test_a_living_supervisor_is_not_pushed_aside(path: Path) -> None:
    async def scenario() -> None:
        async with control(path):
            with pytest.raises(TryLater, match="another supervisor"):
                await ControlServer(path, {}).start()
            assert (await get(path)).status == 200

    asyncio.run(scenario())


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")

    async def scenario() -> None:
        with pytest.raises(VllmdError, match="listen on"):
            await ControlServer(path, {}).start()

    asyncio.run(scenario())
    assert path.read_text() == "precious"


def test_a_long_path(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 120) / "control.sock"
    path.parent.mkdir()

    async def scenario() -> None:
        async with control(path):
            assert (await get(path)).status == 200

    asyncio.run(scenario())
    assert os.listdir(path.parent) == []  # noqa: PTH208


def test_who_may_post_is_asked_of_the_user_database_once_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database may be a directory server that does not answer: within the loop nobody waits for it."""

    async def scenario() -> None:
        server = ControlServer(path, {}, actions={"/do": lambda _body, peer: (200, "text/plain", str(peer.gids).encode())})
        await server.start()
        monkeypatch.setattr(grp, "getgrnam", lambda name: pytest.fail(f"asked for {name}"))
        monkeypatch.setattr(os, "geteuid", lambda: 4711)  # neither root nor our own user: the group decides
        monkeypatch.setattr(control_module, "peer_of", lambda _link: Peer(1, 4712, frozenset({99})))
        monkeypatch.setattr(server, "_admins", 99)
        assert (await get(path, "/do", "POST")).status == 200
        monkeypatch.setattr(server, "_admins", 98)
        assert (await get(path, "/do", "POST")).status == 403
        monkeypatch.setattr(server, "_admins", -1)
        assert (await get(path, "/do", "POST")).status == 403
        monkeypatch.undo()
        await server.close()

    asyncio.run(scenario())
