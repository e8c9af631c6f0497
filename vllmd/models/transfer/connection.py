"""One HTTP/1.1 connection, straight or through a proxy. h11 reads the heads; the bytes of a body go past it.

All calls block without a timeout: who watches the connections (models/transfer/watch) ends the one that hangs by `abort`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import h11

from vllmd.models.transfer.answers import Again
from vllmd.models.transfer.routes import Route
from vllmd.models.transfer.secured import Secured

MAX_HEAD_BYTES = 64 << 10
MAX_ERROR_BYTES = 64 << 10
FIRST_READ_BYTES = 64 << 10
CONNECT_S = 15.0
MIN_RATE = 1024
"""Bytes/s; less than that over a whole stall time is as good as nothing."""


@dataclass(frozen=True, slots=True)
class Head:
    """`length` of the body where it has one; None where it must be read by `chunks`. Header names in lower case."""

    status: int
    headers: Mapping[str, str]
    length: int | None


class Connection:
    """For one thread, but for `abort`, `waiting_s` and `close`. Network errors come as OSError or as Again."""

    def __init__(self, route: Route, stall_s: float) -> None:
        self.route = route
        self.reused = False
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._secured: Secured | None = None
        self._left = 0
        self._http = h11.Connection(h11.CLIENT)
        self._rest = b""
        self._aborted = ""
        self._waits_since = 0.0
        self._window_s = 0.0
        self._window_bytes = 0

    @property
    def secured(self) -> Secured | None:
        """What decrypts its bytes; None where they are plain."""
        return self._secured

    @property
    def wire(self) -> socket.socket | Secured:
        """What the bytes go through."""
        return self.plain if self._secured is None else self._secured

    @property
    def plain(self) -> socket.socket:
        """What its bytes are on the network."""
        if self._socket is None:
            raise ConnectionError("closed")
        return self._socket

    @property
    def aborted(self) -> str:
        """Why it was aborted; '' where it was not."""
        return self._aborted

    def waited_s(self, now: float) -> float:
        """How long it has been waiting for the other side without a byte."""
        since = self._waits_since
        return now - since if since else 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = 0.0

    def waits_since(self, now: float) -> None:
        """The same without a block, for loops: a byte came, and more are waited for; 0 for not any more."""
        self._waits_since = now

    @contextlib.contextmanager
    def patience(self, limit_s: float) -> Iterator[None]:
        """Meanwhile a wait for bytes that is longer than that gives BlockingIOError. By the kernel's own clock: a timeout of
        Python's costs a poll before each read."""
        self._limit_waits(limit_s)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # closed meanwhile
                self._limit_waits(0.0)

    def _limit_waits(self, limit_s: float) -> None:
        seconds, part = divmod(limit_s, 1)
        self.plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(part * 1e6)))

    def abort(self, reason: str) -> None:
        """End it from another thread: what blocks on it returns at once."""
        with self._lock:
            self._aborted = reason
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def open(self, secure: ssl.SSLContext) -> None:
        """OSError; SourceUnavailable where the certificate is not trusted."""
        proxy = self.route.proxy
        if proxy is None:
            self._connect(self.route.host, self.route.port)
        else:
            self._connect(proxy.host, proxy.port)
            if proxy.tls:
                self._wrap(secure, proxy.host)
            if self.route.tls:
                self._tunnel(proxy.authorization)
        if self.route.tls:
            self._wrap(secure, self.route.host)

    def _connect(self, host: str, port: int) -> None:
        last: OSError = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            made = socket.socket(family, kind, protocol)
            self._use(made)
            try:
                made.settimeout(min(CONNECT_S, self._stall_s))
                made.connect(address)
                made.settimeout(None)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return
            except OSError as error:
                last = error
                self.close()
        raise last

    def _use(self, made: socket.socket) -> None:
        with self._lock:
            if self._aborted:
                made.close()
                raise ConnectionAbortedError(self._aborted)
            self._socket = made

    def _wrap(self, secure: ssl.SSLContext, host: str) -> None:
        secured = Secured(self.plain, secure, host)
        with self.waiting():
            secured.do_handshake()
        self._secured = secured

    def _tunnel(self, authorization: str) -> None:
        headers = {"Host": f"{self.route.host}:{self.route.port}"}
        if authorization:
            headers["Proxy-Authorization"] = authorization
        host = f"[{self.route.host}]" if ":" in self.route.host else self.route.host
        head = self.ask("CONNECT", f"{host}:{self.route.port}", headers)
        if not 200 <= head.status < 300:
            raise ProxyRefusal(head.status)

    def ask(self, method: str, target: str, headers: Mapping[str, str]) -> Head:
        """Send a request without a body, and read the head of its answer."""
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._rest, self._left = b"", 0
        self._window_s, self._window_bytes = 0.0, 0
        try:
            data = self._http.send(h11.Request(method=method, target=target, headers=list(headers.items()))) or b""
            data += self._http.send(h11.EndOfMessage()) or b""
            with self.waiting():
                self.wire.sendall(data)
            answer = self._next_event()
            while isinstance(answer, h11.InformationalResponse):
                answer = self._next_event()
        except h11.RemoteProtocolError as error:
            raise Again(f"{self.route.authority} does not speak HTTP: {error}") from error
        if not isinstance(answer, h11.Response):
            raise ConnectionResetError("closed before it answered")
        named: dict[str, str] = {}
        for name, value in answer.headers:
            named.setdefault(name.decode("ascii").lower(), value.decode("latin-1"))
        length = _length(method, answer.status_code, named)
        if length is not None:  # else h11 goes on with the body
            self._rest, self._left = self._http.trailing_data[0], length
        return Head(answer.status_code, named, length)

    def _next_event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = self._receive(FIRST_READ_BYTES)
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise ConnectionResetError("closed before it answered")
            self._http.receive_data(data)
        return event

    def _receive(self, count: int) -> bytes:
        with self.waiting():
            return self.wire.recv(count)

    def first(self, limit: int) -> bytes:
        """Bytes of the body that came with the head, at most `limit`."""
        taken, self._rest = self._rest[:limit], self._rest[limit:]
        self._left -= len(taken)
        return taken

    def chunks(self) -> Iterator[bytes]:
        """A body without a length, to its end."""
        try:
            while not isinstance(event := self._next_event(), h11.EndOfMessage):
                if not isinstance(event, h11.Data):
                    raise ConnectionResetError("closed within its body")
                self.moved(len(event.data), 0.0)
                yield bytes(event.data)
        except h11.RemoteProtocolError as error:
            raise Again(f"{self.route.authority} ended its answer early: {error}") from error

    def short_body(self, head: Head, limit: int = MAX_ERROR_BYTES) -> bytes:
        """The body of an error, a redirect or a listing, as far as anybody wants to read it. Whether the connection can be used again."""
        if head.length is None:
            body = b""
            for chunk in self.chunks():
                body += chunk
                if len(body) > limit:
                    break
            return body
        body = self.first(head.length)
        while len(body) < min(head.length, limit + 1):
            data = self._receive(MAX_ERROR_BYTES)
            if not data:
                break
            body += data
            self._left -= len(data)
        return body

    def moved(self, count: int, waited_s: float) -> None:
        """Bytes came after waiting for them that long; Again where that is too slow to go on with."""
        self._left -= count
        self._window_s += waited_s
        self._window_bytes += count
        if self._window_s >= self._stall_s:
            if self._window_bytes < MIN_RATE * self._window_s:
                raise Again(f"{self.route.authority} gave {self._window_bytes} bytes in {self._window_s:.0f} s")
            self._window_s, self._window_bytes = 0.0, 0

    def is_reusable(self, head: Head) -> bool:
        """After its body was read to the end."""
        is_read = self._left == 0 if head.length is not None else self._http.their_state is h11.DONE
        if self._rest or self.aborted or not is_read:
            return False
        return self._http.their_http_version == b"1.1" and "close" not in head.headers.get("connection", "").lower()

    def is_idle(self) -> bool:
        """Kept, and neither closed by the other side nor with bytes that nobody asked for."""
        if self._socket is None or self._rest or not (self._secured is None or self._secured.is_idle):
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)


class ProxyRefusal(Exception):
    """The proxy did not open the tunnel."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the proxy answered {status}")
        self.status = status


def _length(method: str, status: int, headers: Mapping[str, str]) -> int | None:
    if method == "CONNECT" or status in (204, 304):
        return 0
    if "transfer-encoding" in headers or "content-length" not in headers:
        return None
    return int(headers["content-length"])
