"""gpu.sock: what the host unit knows, to whoever may connect. GET /status, /metrics, and /events: JSON lines for ever.

A client that never reads costs its place and a bounded queue, and nobody waits for it: it loses the oldest snapshots, then
the oldest findings, and after a while its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllmd.core.gpu_findings import Finding
from vllmd.system.control import ControlServer

SUBSCRIBERS_MAX = 64
QUEUE = 256
SILENT_S = 60.0
"""A client that takes nothing for this long is let go."""
_HEAD = b"HTTP/1.1 %s\r\nContent-Type: %s\r\nCache-Control: no-store\r\nConnection: close\r\n"
_HEAD_LIMIT = 16 << 10
_EVENTS = re.compile(rb"/events(?:\?since=([0-9]{1,12}(?:\.[0-9]{1,9})?))?")


class _Subscriber:
    """What waits for one client: findings in their order, and the latest snapshot only."""

    def __init__(self) -> None:
        self.findings: deque[bytes] = deque(maxlen=QUEUE)
        self.snapshot = b""
        self.dropped = 0
        self._some = asyncio.Event()

    def put(self, finding: bytes) -> None:
        self.dropped += len(self.findings) == QUEUE
        self.findings.append(finding)
        self._some.set()

    def put_snapshot(self, line: bytes) -> None:
        self.snapshot = line
        self._some.set()

    async def take(self) -> bytes:
        await self._some.wait()
        self._some.clear()
        lines = b"".join(self.findings) + self.snapshot
        self.findings.clear()
        self.snapshot = b""
        return lines


class Feed(ControlServer):
    """`document` gives what /status says."""

    def __init__(self, path: Path, document: Callable[[], Mapping[str, Any]], metrics: Callable[[], bytes]) -> None:
        routes = {
            "/status": lambda: ("application/json", json.dumps(document()).encode() + b"\n"),
            "/metrics": lambda: ("text/plain; version=0.0.4; charset=utf-8", metrics()),
        }
        super().__init__(path, routes)
        self._document = document
        self._subscribers: set[_Subscriber] = set()
        self._streams: set[asyncio.Task[None]] = set()
        self._recent: deque[tuple[float, bytes]] = deque(maxlen=QUEUE)

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    def tell(self, finding: Finding) -> None:
        line = json.dumps({"finding": finding.as_dict()}).encode() + b"\n"
        self._recent.append((finding.at, line))
        for each in self._subscribers:
            each.put(line)

    def show(self, document: Mapping[str, Any]) -> None:
        line = json.dumps({"snapshot": document}).encode() + b"\n"
        for each in self._subscribers:
            each.put_snapshot(line)

    async def close(self) -> None:
        for task in list(self._streams):
            task.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)
        await super().close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A subscriber does not take one of the places of those who only ask."""
        task = asyncio.create_task(self._first_line(reader, writer))
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)

    async def _first_line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._streams) > 2 * SUBSCRIBERS_MAX:
            writer.transport.abort()
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                head = await reader.readuntil(b"\r\n\r\n")
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
            return
        words = head.split(b"\r\n", 1)[0].split(b" ")
        asked = _EVENTS.fullmatch(words[1]) if len(words) == 3 and words[0] == b"GET" else None
        if asked is None:
            whole = asyncio.StreamReader()
            whole.feed_data(head)
            super()._accept(whole, writer)
        elif len(self._subscribers) < SUBSCRIBERS_MAX:
            await self._stream(reader, writer, float(asked[1]) if asked[1] else None)
        else:
            writer.write(_HEAD % (b"503 Service Unavailable", b"text/plain") + b"\r\ntoo many\n")
            writer.close()

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, since: float | None) -> None:
        me = _Subscriber()
        me.put_snapshot(json.dumps({"snapshot": self._document()}).encode() + b"\n")
        for at, line in self._recent if since is not None else ():
            if since is not None and at > since:
                me.put(line)
        self._subscribers.add(me)
        leaving = asyncio.create_task(reader.read(1))  # nothing is expected: whatever comes, it is the end
        try:
            writer.write(_HEAD % (b"200 OK", b"application/x-ndjson") + b"\r\n")
            while lines := await _next(me, leaving):
                writer.write(lines)
                async with asyncio.timeout(SILENT_S):
                    await writer.drain()
        except (OSError, TimeoutError):
            pass
        finally:
            self._subscribers.discard(me)
            await _cancel(leaving)
            writer.transport.abort()


async def _next(me: _Subscriber, leaving: asyncio.Task[bytes]) -> bytes:
    """What is there, or b'' when the client has left."""
    taking = asyncio.create_task(me.take())
    try:
        await asyncio.wait([taking, leaving], return_when=asyncio.FIRST_COMPLETED)
        return b"" if leaving.done() else taking.result()
    finally:
        await _cancel(taking)


async def _cancel(task: asyncio.Task[bytes]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, OSError):
        await task
