"""Requests in flight against one engine: streams that are read as they come, slowly, or never. One thread reads them all."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self


class Streams:
    """`bytes_per_s` 0: as fast as they come; else each stream is read no faster. `last_at`: when anything came last."""

    def __init__(self, port: int, bodies: list[dict[str, Any]], *, bytes_per_s: float = 0.0) -> None:
        self.last_at = 0.0
        self.received = 0
        self.ended = 0
        self._bytes_per_s = bytes_per_s
        self._sockets: list[socket.socket] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="streams", daemon=True)
        try:
            for body in bodies:
                self._sockets.append(_ask(port, body, small=bool(bytes_per_s)))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(10)
        self._close()

    def _close(self) -> None:
        for sock in self._sockets:
            sock.close()

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for sock in self._sockets:
                selector.register(sock, selectors.EVENT_READ)
            while not self._stop.is_set() and selector.get_map():
                for key, _ in selector.select(0.1):
                    assert isinstance(key.fileobj, socket.socket)
                    if not self._take(key.fileobj):
                        selector.unregister(key.fileobj)
                        self.ended += 1
                if self._bytes_per_s:
                    self._stop.wait(64 / self._bytes_per_s)

    def _take(self, sock: socket.socket) -> bool:
        with contextlib.suppress(OSError):
            data = sock.recv(64 if self._bytes_per_s else 1 << 16)
            if data:
                self.last_at = time.monotonic()
                self.received += len(data)
                return not data.endswith(b"\r\n0\r\n\r\n")
        return False


def _ask(port: int, body: dict[str, Any], *, small: bool) -> socket.socket:
    sock = socket.socket()
    try:
        if small:  # a reader that is slow must be felt at the other end
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", port))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def endless(tokens: int) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", "max_tokens": tokens, "stream": True, "ignore_eos": True}


def prefill(tokens: int, seed: int) -> dict[str, Any]:
    """A prompt of so many tokens, like no other: nothing of it is cached."""
    return {"model": "tiny", "prompt": [1 + (seed * 7919 + index * 31) % 200 for index in range(tokens)], "max_tokens": 1, "stream": True}


@contextlib.contextmanager
def flowing(port: int, count: int, tokens: int) -> Iterator[Streams]:
    """From the moment at which something comes."""
    with Streams(port, [endless(tokens)] * count) as streams:
        deadline = time.monotonic() + 60
        while streams.received < 2000 * count:
            assert time.monotonic() < deadline, "no stream flows"
            time.sleep(0.02)
        yield streams
