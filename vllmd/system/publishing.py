"""Where our metrics go besides our own sockets: a listener for Prometheus, and a file for node_exporter's textfile collector.

Neither ever ends an instance. The model serves customers, the figures serve those who look after it: a port that somebody
else has is said once, with what to do, and tried again until it is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from vllmd.config.settings import Metrics
from vllmd.errors import VllmdError
from vllmd.system.control import ControlServer, Route, TcpServer
from vllmd.system.files import write_atomic
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr
from vllmd.system.threads import in_thread

RETRY_S = 10.0
_REMOVE_S = 2.0


class Publisher:
    """`apply` at the start and after each reload; `close` at the end. `route` gives what is published; `file` is its name in the
    collector's directory."""

    def __init__(self, file: str, route: Route, journal: Journal | Stderr, *, retry_s: float = RETRY_S) -> None:
        self._file = file
        self._route = route
        self._journal = journal
        self._retry_s = retry_s
        self._settings: Metrics | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._applying: asyncio.Task[None] | None = None

    def apply(self, settings: Metrics) -> None:
        if settings == self._settings:
            return
        self._settings = settings
        before = self._applying
        self._applying = asyncio.create_task(self._restart(before, settings))

    async def close(self) -> None:
        """Idempotent. The port is free and the file is gone, if its file system answers."""
        if self._applying is not None:
            self._applying.cancel()
            await asyncio.gather(self._applying, return_exceptions=True)
        await self._stop()

    async def _restart(self, before: asyncio.Task[None] | None, settings: Metrics) -> None:
        if before is not None:
            await before
        await self._stop()
        works: list[Coroutine[Any, Any, None]] = []
        if settings.listen:
            works.append(self._listen(settings.listen))
        if settings.textfile:
            works.append(self._write(Path(settings.textfile) / self._file, settings.interval_s))
        self._tasks = [asyncio.create_task(work) for work in works]

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _listen(self, where: str) -> None:
        said = _Said(self._journal, where)
        while True:
            server = _server(where, self._route)
            try:
                await server.start()
                said.works(f"metrics are served at {where}")
                await asyncio.Event().wait()
            except (OSError, VllmdError) as error:
                hint = "Free it, or set metrics.listen to another address and reload the instance; until then it is tried again."
                said.fails(f"cannot serve metrics at {where}: {_reason(error)}", hint)
            finally:
                await server.close()
            await asyncio.sleep(self._retry_s)

    async def _write(self, path: Path, interval_s: float) -> None:
        said = _Said(self._journal, str(path))
        file = _File(path)
        try:
            while True:
                try:
                    content = self._route()[1]
                    await in_thread(partial(file.replace, content))
                    said.works(f"metrics are written to {path}")
                except OSError as error:
                    hint = f"{path.parent} must exist and be writable for the service: chown it, and name it in ReadWritePaths= of the unit."
                    said.fails(f"cannot write metrics to {path}: {_reason(error)}", hint)
                except Exception as error:  # a bug of ours ends neither the file nor the instance
                    asyncio.get_running_loop().call_exception_handler({"message": "metrics could not be made", "exception": error})
                await asyncio.sleep(interval_s)
        finally:
            # A file that stays would tell for ever that all is well.
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_REMOVE_S):
                    await in_thread(file.remove)


class _Said:
    """A complaint is journalled when it is new, and that it is over."""

    def __init__(self, journal: Journal | Stderr, where: str) -> None:
        self._journal = journal
        self._where = where
        self._complaint = ""

    def fails(self, what: str, hint: str) -> None:
        if what != self._complaint:
            self._complaint = what
            self._journal.event("metrics-unavailable", what, priority=4, hint=hint, where=self._where)

    def works(self, what: str) -> None:
        if self._complaint:
            self._complaint = ""
            self._journal.event("", what, priority=5)


class _File:
    """Its methods run in threads of their own. What a cancelled `replace` still does comes before `remove`, or not at all: one
    that was overtaken wrote the file again behind its removal."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._removed = False

    def replace(self, content: bytes) -> None:
        with self._lock:
            if self._removed:
                return
            directory = self._path.parent
            if not directory.is_dir():  # in /run it is gone after a reboot
                directory.mkdir(mode=0o755, exist_ok=True)
                directory.chmod(0o755)  # node_exporter is another user, whatever our umask is
            write_atomic(self._path, content, fsync=False)

    def remove(self) -> None:
        with self._lock:
            self._removed = True
            self._path.unlink(missing_ok=True)


def _server(where: str, route: Route) -> ControlServer | TcpServer:
    routes = {"/metrics": route}
    if where.startswith("/"):
        return ControlServer(Path(where), routes)
    host, _, port = where.rpartition(":")
    return TcpServer(host.strip("[]"), int(port), routes)


def _reason(error: OSError | VllmdError) -> str:
    return error.what if isinstance(error, VllmdError) else error.strerror or str(error)

