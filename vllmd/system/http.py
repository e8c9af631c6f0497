"""One HTTP request to an engine, told apart by what it means for the engine's life.

Refused, timed out, reset, nonsense and answered are five different facts: only explicit refusals ever end an instance.
Every request has a connection of its own, so a broken one says nothing about the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h11

from vllmd.core.plan import Endpoint
from vllmd.system.control import ControlServer
from vllmd.system.unixpath import short

__all__ = ["Answer", "ControlServer", "Outcome", "request"]

Outcome = Literal["answered", "refused", "timeout", "reset", "invalid"]
_CHUNK = 1 << 16
_HEAD_BYTES = 64 << 10
_RETRY_S = 0.02
_REFUSED = {errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR}


@dataclass(frozen=True, slots=True)
class Answer:
    """`refused`: nobody listens. `timeout`: no whole answer within the time. `reset`: the connection broke, or could not
    be made for another reason. `invalid`: what came is not HTTP, or larger than the limit. `status` and `body` are set for
    `answered` only."""

    outcome: Outcome
    status: int = 0
    body: bytes = b""
    elapsed_s: float = 0.0
    detail: str = ""
    """For people: why it is not `answered`."""


async def request(
    endpoint: Endpoint,
    method: str,
    path: str,
    *,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
    limit_bytes: int = 1 << 20,
    sink: Callable[[bytes], None] | None = None,
) -> Answer:
    """Ask once. Never raises for what the network or the other side does. `sink` gets the body as it comes, and Answer.body
    stays empty: a body that is only looked through need not be held."""
    started = time.monotonic()

    def answer(outcome: Outcome, status: int = 0, content: bytes = b"", detail: str = "") -> Answer:
        return Answer(outcome, status, content, time.monotonic() - started, detail)

    try:
        async with asyncio.timeout(timeout_s):
            status, content = await _exchange(endpoint, method, path, body, headers or {}, limit_bytes, sink)
            return answer("answered", status, content)
    except TimeoutError:
        return answer("timeout", detail=f"no answer within {timeout_s:g} s")
    except (h11.RemoteProtocolError, _TooLargeError) as error:
        return answer("invalid", detail=str(error))
    except OSError as error:
        return answer("refused" if error.errno in _REFUSED else "reset", detail=error.strerror or str(error))


class _TooLargeError(Exception):
    pass


async def _exchange(
    endpoint: Endpoint,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    limit_bytes: int,
    sink: Callable[[bytes], None] | None,
) -> tuple[int, bytes]:
    loop = asyncio.get_running_loop()
    # First: a starting engine refuses hundreds of probes while it needs every core, and those need no request.
    link = await _connect(loop, endpoint)
    try:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
        sent = _request_bytes(connection, endpoint, method, path, body, headers)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may answer 4xx without reading all of it
            await loop.sock_sendall(link, sent)
        return await _receive(loop, link, connection, limit_bytes, sink)
    finally:
        link.close()


def _request_bytes(
    connection: h11.Connection, endpoint: Endpoint, method: str, path: str, body: bytes, headers: Mapping[str, str]
) -> bytes:
    fields = {"Host": _host(endpoint), "User-Agent": "vllmd", "Accept": "*/*", **headers}
    if body or method not in ("GET", "HEAD"):
        fields["Content-Length"] = str(len(body))
    sent = connection.send(h11.Request(method=method, target=path, headers=list(fields.items()))) or b""
    sent += (connection.send(h11.Data(data=body)) or b"") if body else b""
    return sent + (connection.send(h11.EndOfMessage()) or b"")


async def _receive(
    loop: asyncio.AbstractEventLoop, link: socket.socket, connection: h11.Connection, limit_bytes: int, sink: Callable[[bytes], None] | None
) -> tuple[int, bytes]:
    status, content, received, length = 0, bytearray(), 0, 0
    take = sink or content.extend
    while True:
        event: Any = connection.next_event()
        if event is h11.NEED_DATA:
            data = await loop.sock_recv(link, _CHUNK)
            if not data and not status:
                raise ConnectionResetError(errno.ECONNRESET, "closed before an answer")
            # Also of what is no content: interim answers, or chunks of one byte, can come without end. And sock_recv does
            # not wait where there is something to read: without a turn of the loop no deadline would ever end this.
            received += len(data)
            if received > 2 * limit_bytes + _HEAD_BYTES:
                raise _TooLargeError(f"the answer is larger than {limit_bytes} bytes")
            await asyncio.sleep(0)
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            take(event.data)
            length += len(event.data)
            if length > limit_bytes:
                raise _TooLargeError(f"the answer is larger than {limit_bytes} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return status, bytes(content)


def _host(endpoint: Endpoint) -> str:
    if endpoint.kind == "uds":
        return "localhost"
    host = endpoint.reachable_host
    return f"[{host}]:{endpoint.port}" if ":" in host else f"{host}:{endpoint.port}"


async def _connect(loop: asyncio.AbstractEventLoop, endpoint: Endpoint) -> socket.socket:
    if endpoint.kind == "uds":
        return await _connect_unix(Path(endpoint.path))
    family, address = await _resolve(loop, endpoint)
    link = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # Close with a reset: whoever closes a connection first keeps a TIME_WAIT remnant, and remnants of our probes on
        # the engine's side would make the exclusive bind of the next start fail with EADDRINUSE.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(link, address)
    except BaseException:
        link.close()
        raise
    return link


async def _resolve(loop: asyncio.AbstractEventLoop, endpoint: Endpoint) -> tuple[int, Any]:
    """A literal address costs no thread; a name is resolved in one."""
    host = endpoint.reachable_host
    with contextlib.suppress(ValueError):
        family = socket.AF_INET6 if ipaddress.ip_address(host.partition("%")[0]).version == 6 else socket.AF_INET
        return family, (host, endpoint.port)
    found = await loop.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM)
    return found[0][0], found[0][4]


async def _connect_unix(path: Path) -> socket.socket:
    """Retried while the backlog is full (EAGAIN): the engine is slow, not absent. asyncio's own connect takes that EAGAIN
    for 'in progress', and the request then fails with ENOTCONN."""
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with short(path) as name:
                link.connect(name)
        except BlockingIOError:
            link.close()
            await asyncio.sleep(_RETRY_S)
        except BaseException:
            link.close()
            raise
        else:
            return link
