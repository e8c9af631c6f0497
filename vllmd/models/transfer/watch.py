"""All connections of a fetch: which of them wait too long for the other side, and how to end them all at once."""

from __future__ import annotations

import threading
import time

from vllmd.models.transfer.connection import Connection
from vllmd.models.transfer.routes import Route


class Watch:
    """All methods work from any thread."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._closed = ""

    def made(self, route: Route) -> Connection:
        connection = Connection(route, self._stall_s)
        with self._lock:
            self._connections.add(connection)
            if self._closed:
                connection.abort(self._closed)
        return connection

    def gone(self, connection: Connection) -> None:
        connection.close()
        with self._lock:
            self._connections.discard(connection)

    def look(self) -> None:
        """To be called now and then: ends what has stalled, and its thread asks anew."""
        now = time.monotonic()
        with self._lock:
            stalled = [each for each in self._connections if each.waited_s(now) >= self._stall_s and not each.aborted]
        for connection in stalled:
            connection.abort(f"no byte from {connection.route.authority} in {self._stall_s:g} s")

    def end(self) -> None:
        with self._lock:
            self._closed = "the fetch ended"
            for connection in self._connections:
                connection.abort(self._closed)
