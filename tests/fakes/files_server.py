"""A file server over HTTP/1.1 with ranges that misbehaves on request, and counts what it served.

    with FilesServer({"a": b"..."}) as server:
        server.script = [answer_500, None]      # one behaviour a request, in order; None serves the file
        server.rule = lambda exchange: ...      # or one for all requests; True where it has answered
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Protocol

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Content(Protocol):
    """bytes, or something as long and as easily cut."""

    def __len__(self) -> int: ...

    def __getitem__(self, piece: slice) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Zeros:
    """A large file that costs nothing."""

    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, piece: slice) -> bytes:
        begin, end, _ = piece.indices(self.size)
        return bytes(end - begin)


@dataclass(frozen=True, slots=True)
class Seen:
    path: str
    headers: Mapping[str, str]
    client: tuple[str, int]


class Exchange(BaseHTTPRequestHandler):
    """One request, as a behaviour sees it."""

    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    @property
    def owner(self) -> FilesServer:
        return self.server.owner

    @property
    def name(self) -> str:
        return self.path.split("?")[0].lstrip("/")

    @property
    def content(self) -> Content | None:
        return self.owner.files.get(self.name)

    @property
    def asked(self) -> tuple[int, int] | None:
        """The range, or None."""
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match is None or self.content is None:
            return None
        return int(match[1]), min(int(match[2]) + 1 if match[2] else len(self.content), len(self.content))

    def do_GET(self) -> None:
        behaviour = self.owner.noted(self)
        if behaviour is not None and behaviour(self):
            return
        self.serve()

    def serve(self) -> None:
        """The file, as it should be."""
        if self.content is None:
            self.reply(404, b"no such file")
            return
        asked = self.asked
        begin, end = asked or (0, len(self.content))
        headers = {"ETag": f'"{self.owner.tags[self.name]}"'} if self.name in self.owner.tags else {}
        if self.headers.get("If-Match", headers.get("ETag")) != headers.get("ETag"):
            self.reply(412)
            return
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(self.content)}"
        self.head(206 if asked else 200, end - begin, headers)
        self.send(begin, end)

    def head(self, status: int, length: int | None, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, begin: int, end: int) -> None:
        """Bytes of the file, counted."""
        assert self.content is not None
        for at in range(begin, end, 1 << 20):
            piece = self.content[at : min(at + (1 << 20), end)]
            self.wfile.write(piece)
            self.owner.count(self.name, len(piece))

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        self.head(status, len(body), headers)
        self.wfile.write(body)

    def hang(self) -> None:
        """Until the server is closed, or the other side is."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            while not self.owner.closing.is_set() and self.connection.recv(4096):
                pass

    def drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        return


Behaviour = Callable[[Exchange], bool]


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128
    owner: FilesServer

    def get_request(self) -> tuple[socket.socket, Any]:
        made, address = super().get_request()
        self.owner.connected(made)
        return made, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # clients that hang up are what the tests are about


@dataclass(slots=True, eq=False)
class FilesServer:
    files: Mapping[str, Content]
    tags: Mapping[str, str] = field(default_factory=dict)
    secure: ssl.SSLContext | None = None
    host: str = "127.0.0.1"
    script: list[Behaviour | None] = field(default_factory=list)
    rule: Behaviour | None = None
    seen: list[Seen] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)
    closing: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sockets: list[socket.socket] = field(default_factory=list)
    _server: _Server | None = None
    _thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}"

    def noted(self, exchange: Exchange) -> Behaviour | None:
        with self._lock:
            self.seen.append(Seen(exchange.path, dict(exchange.headers), exchange.client_address))
            return self.script.pop(0) if self.script else self.rule

    def count(self, name: str, size: int) -> None:
        with self._lock:
            self.served[name] = self.served.get(name, 0) + size

    def connected(self, made: socket.socket) -> None:
        with self._lock:
            self._sockets.append(made)

    def __enter__(self) -> FilesServer:
        kind = type("V6", (_Server,), {"address_family": socket.AF_INET6}) if ":" in self.host else _Server
        self._server = kind((self.host, 0), Exchange)
        self._server.owner = self
        if self.secure is not None:
            self._server.socket = self.secure.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server is not None
        assert self._thread is not None
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(each, socket.SHUT_RDWR)
        self._server.server_close()


def status(code: int, body: bytes = b"", **headers: str) -> Behaviour:
    def behave(exchange: Exchange) -> bool:
        exchange.reply(code, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return behave


def cut_after(count: int) -> Behaviour:
    """The head promises all, and `count` bytes come."""

    def behave(exchange: Exchange) -> bool:
        begin, end = exchange.asked or (0, len(exchange.content or b""))
        size = len(exchange.content or b"")
        exchange.head(206 if exchange.asked else 200, end - begin, {"Content-Range": f"bytes {begin}-{end - 1}/{size}"} if exchange.asked else {})
        exchange.send(begin, min(begin + count, end))
        exchange.drop()
        return True

    return behave


def stall_after(count: int) -> Behaviour:
    def behave(exchange: Exchange) -> bool:
        begin, end = exchange.asked or (0, len(exchange.content or b""))
        size = len(exchange.content or b"")
        exchange.head(206 if exchange.asked else 200, end - begin, {"Content-Range": f"bytes {begin}-{end - 1}/{size}"} if exchange.asked else {})
        exchange.send(begin, min(begin + count, end))
        exchange.hang()
        return True

    return behave


def no_ranges(exchange: Exchange) -> bool:
    if exchange.content is None:
        return False
    exchange.head(200, len(exchange.content))
    exchange.send(0, len(exchange.content))
    return True


def chunked(exchange: Exchange) -> bool:
    """The whole file, in chunks and without a length."""
    assert exchange.content is not None
    exchange.head(200, None, {"Transfer-Encoding": "chunked"})
    for at in range(0, len(exchange.content), 70000):
        piece = exchange.content[at : at + 70000]
        exchange.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    exchange.wfile.write(b"0\r\n\r\n")
    return True


def redirect(url: str, code: int = 302) -> Behaviour:
    return status(code, b"", Location=url)
