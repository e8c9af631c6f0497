"""The instance's own HTTP server: GET /status and GET /metrics on control.sock, for vllmctl; GET /metrics where Prometheus asks.
On control.sock also POST, for those who may (system/peer).

A client that sends nothing, or never reads, costs one of 32 places for ten seconds and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h11

from vllmd.errors import TryLater
from vllmd.system.access import admit_group
from vllmd.system.files import storage_error
from vllmd.system.peer import ADMINS, Peer, group_id, peer_of
from vllmd.system.unixpath import short

CONNECTIONS_MAX = 32
CLIENT_TIMEOUT_S = 10.0
_CHUNK = 1 << 14
BODY_MAX = 16 << 10
Route = Callable[[], tuple[str, bytes]]
Reply = tuple[int, str, bytes]
"""Status, content type, body."""
Action = Callable[[bytes, Peer], Reply]


class HttpServer:
    """`routes` maps a path to what gives (content type, body); called in the loop, so it must not block."""

    def __init__(self, routes: Mapping[str, Route], *, timeout_s: float = CLIENT_TIMEOUT_S) -> None:
        self._routes = routes
        self._timeout_s = timeout_s
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Idempotent."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._forget()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _forget(self) -> None:
        """Removes what names the listener, where something does."""

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                writer.write(await self._answer(reader, writer))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError):
            pass
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16 << 10)
        try:
            request = await _read_request(reader, connection)
            content = await _read_body(reader, connection) if request.method == b"POST" else b""
        except h11.RemoteProtocolError:
            return _response(connection, 400, "text/plain", b"bad request\n")
        try:
            status, kind, body = self._route(path_of(request), request.method, content, writer)
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler({"message": "a route of the control socket failed", "exception": error})
            status, kind, body = 500, "text/plain", b"internal error\n"
        return _response(connection, status, kind, body)

    def _route(self, path: str, method: bytes, content: bytes, writer: asyncio.StreamWriter) -> Reply:
        del content, writer
        route = self._routes.get(path)
        if route is None:
            return 404, "text/plain", b"not found\n"
        if method != b"GET":
            return 405, "text/plain", b"only GET\n"
        return (200, *route())


class ControlServer(HttpServer):
    """On a unix socket, mode 0660. `actions` are what may be POSTed, by root, our own user and the administrators' group;
    they must not block either."""

    def __init__(
        self, path: Path, routes: Mapping[str, Route], *, actions: Mapping[str, Action] | None = None, timeout_s: float = CLIENT_TIMEOUT_S
    ) -> None:
        super().__init__(routes, timeout_s=timeout_s)
        self.path = path
        self._actions = actions or {}
        self._inode = 0
        self._admins = -1
        """The group's number, asked once: the user database may be a server that does not answer."""

    async def start(self) -> None:
        """Listen. TryLater when another supervisor answers there; PermissionMissing, StorageFailed."""
        try:
            self._admins = group_id(ADMINS)
            listener = _listen(self.path, self._admins)
            self._inode = self.path.lstat().st_ino
        except OSError as error:
            raise storage_error(error, f"listen on {self.path}") from error
        self._server = await asyncio.start_unix_server(self._accept, sock=listener)

    def _route(self, path: str, method: bytes, content: bytes, writer: asyncio.StreamWriter) -> Reply:
        action = self._actions.get(path)
        if action is None or (method != b"POST" and path in self._routes):
            return super()._route(path, method, content, writer)
        if method != b"POST":
            return 405, "text/plain", b"only POST\n"
        peer = peer_of(writer.get_extra_info("socket"))
        if not peer.is_allowed(self._admins):
            return 403, "text/plain", f"only root, the service's own user and the group {ADMINS} may do this\n".encode()
        return action(content, peer)

    def _forget(self) -> None:
        """The socket's file is removed if it is still ours."""
        with contextlib.suppress(OSError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()


class TcpServer(HttpServer):
    """On an address, which is no name: nobody waits for a resolver here."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route], *, timeout_s: float = CLIENT_TIMEOUT_S) -> None:
        super().__init__(routes, timeout_s=timeout_s)
        self.host, self.port = host, port

    async def start(self) -> None:
        """Listen. OSError when somebody has the port, or the host has no such address."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))
            listener.listen(CONNECTIONS_MAX)
            self._server = await asyncio.start_server(self._accept, sock=listener)
        except BaseException:
            listener.close()
            raise


async def _read_request(reader: asyncio.StreamReader, connection: h11.Connection) -> h11.Request:
    while True:
        event: Any = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            raise ConnectionResetError("no request")
        connection.receive_data(await reader.read(_CHUNK))


async def _read_body(reader: asyncio.StreamReader, connection: h11.Connection) -> bytes:
    content = bytearray()
    while True:
        event: Any = connection.next_event()
        if isinstance(event, h11.EndOfMessage):
            return bytes(content)
        if isinstance(event, h11.Data):
            content += event.data
            if len(content) > BODY_MAX:
                raise h11.RemoteProtocolError("the body is too long")
        elif event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_CHUNK))
        else:
            raise ConnectionResetError("no whole request")


def path_of(request: h11.Request) -> str:
    return request.target.partition(b"?")[0].decode("latin-1")


def _response(connection: h11.Connection, status: int, kind: str, body: bytes) -> bytes:
    headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close"), ("Cache-Control", "no-store")]
    sent = connection.send(h11.Response(status_code=status, headers=headers)) or b""
    return sent + (connection.send(h11.Data(data=body)) or b"") + (connection.send(h11.EndOfMessage()) or b"")


def _listen(path: Path, admins: int) -> socket.socket:
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with short(path) as name:
            listener.bind(name)
            os.chmod(path, 0o660)  # noqa: PTH101 - before listen: until then nobody can connect
            if admins >= 0:
                admit_group(path, admins)
        listener.listen(CONNECTIONS_MAX)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Only a socket of ours where nobody answers; bind refuses everything else with EADDRINUSE."""
    try:
        about = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(about.st_mode) or about.st_uid != os.geteuid():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        try:
            with short(path) as name:
                probe.connect(name)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody is there
    raise TryLater("control_socket_in_use", f"another supervisor answers on {path}", "Stop the other one first: `vllmctl status` shows it.")
