"""What an instance and the commands learn about GPUs: from the host unit's gpu.sock, or, where nobody answers there, from a
sampler child of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator

from vllmd.config.paths import Paths
from vllmd.config.settings import GpuWatch
from vllmd.core.gpu_book import Book
from vllmd.core.gpu_findings import Finding, is_same, moment, parse
from vllmd.gpu import kmsg, quarantine, sampling
from vllmd.gpu.ask import Snapshot, ask, document, object_of
from vllmd.gpu.sampling import Options, Stage
from vllmd.gpu.watch import Sources, Watch
from vllmd.system.host import boot_id
from vllmd.system.unixpath import short

ANSWER_S = 5.0
"""A host unit that has said nothing for this long after we connected is no help (stopped, or hung)."""
GRACE_S = 1.0
"""It may just be restarting: no instance starts a sampler at once."""
OVERLAP_S = 2.0
"""A service that comes back is asked for a little more than what was missed; what is known is not told again."""
_QUEUE = 256
_LINE_BYTES = 4 << 20
_CHUNK = 1 << 16


class Client:
    """One subscription, from `stream` until `close`. `sources`: what a watch of our own reads (tests)."""

    def __init__(self, paths: Paths, settings: GpuWatch | None = None, *, sources: Sources | None = None, retry_s: float = 5.0) -> None:
        self._paths = paths
        self._settings = settings or GpuWatch()
        self._sources = sources
        self._retry_s = retry_s
        self._findings: deque[Finding] = deque(maxlen=_QUEUE)
        self._snapshot: Snapshot | None = None
        self._some = asyncio.Event()
        self._own: asyncio.Task[None] | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._heard_at = 0.0
        """Until when (its clock) the host unit's words are known here: it is asked for those since."""
        self._heard_mono = 0.0
        """When we last heard of the GPUs, from whomever."""
        self._known: deque[Finding] = deque(maxlen=_QUEUE)
        self.source = ""
        """Where it comes from now: 'host' (gpu.sock), 'own' (a child of ours), '' before the first."""

    async def stream(self) -> AsyncIterator[Finding | Snapshot]:
        """Until `close` or cancellation: findings at once, a snapshot every interval. Never raises for what the other side
        does. A consumer that is slow loses snapshots, then findings, the oldest first."""
        feeding = self._feeding = asyncio.create_task(self._feed())
        feeding.add_done_callback(lambda _task: self._some.set())
        try:
            while not feeding.done():
                await self._some.wait()
                self._some.clear()
                while self._findings:
                    yield self._findings.popleft()
                snapshot, self._snapshot = self._snapshot, None
                if snapshot is not None:
                    yield snapshot
        finally:
            await self.close()

    async def close(self) -> None:
        """Idempotent; nothing is left of a child of ours."""
        feeding, self._feeding = self._feeding, None
        if feeding is not None:
            await _ended(feeding)
        await self._stop_own()
        self._some.set()

    # -- from the host unit

    async def _feed(self) -> None:
        absent_since = time.monotonic()
        while True:
            await self._from_host()
            if self.source == "host":
                self.source, absent_since = "", time.monotonic()
            if self._own is not None and self._own.done():
                await self._stop_own()
            if self._own is None and time.monotonic() - absent_since >= min(GRACE_S, self._retry_s):
                self._own = asyncio.create_task(self._watch())
            await asyncio.sleep(min(GRACE_S, self._retry_s) if self._own is None else self._retry_s)

    async def _from_host(self) -> None:
        """Until it ends, or says nothing for too long."""
        # A service that is killed ends within its first words: that is an EOFError, and it made us deaf for ever.
        with contextlib.suppress(OSError, TimeoutError, ValueError, EOFError, asyncio.LimitOverrunError):
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                with short(self._paths.gpu_socket) as name:
                    link.connect(name)
                reader, writer = await asyncio.open_unix_connection(sock=link, limit=_LINE_BYTES)
            except BaseException:
                link.close()
                raise
            try:
                await self._read(reader, writer)
            finally:
                writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        since = f"?since={max(0.0, self._heard_at - OVERLAP_S):.7f}" if self._heard_at else ""
        writer.write(f"GET /events{since} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        async with asyncio.timeout(ANSWER_S):
            head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            return
        until = asyncio.get_running_loop().time() + ANSWER_S
        while True:
            async with asyncio.timeout_at(until):
                line = await reader.readline()
            if not line:
                return
            if (said := _said(line)) is None:  # words without sense are as good as none
                continue
            until = asyncio.get_running_loop().time() + max(ANSWER_S, 4 * self._settings.interval_s + self._settings.call_timeout_s)
            if self.source != "host":
                await self._stop_own()
                self.source = "host"
            self._take(said)

    def _take(self, said: Finding | Snapshot) -> None:
        if isinstance(said, Finding):
            self._heard_at = max(self._heard_at, said.at)
            self._told(said)
        else:
            self._heard_at = max(self._heard_at, moment(said.get("at")) or 0.0)
            self._seen(said)

    # -- a watch of our own

    async def _watch(self) -> None:
        """What the kernel said before is of other lives; where its log may not be read, NVML's events must do."""
        sources = self._sources or Sources(since=self._since())
        watch = Watch(self._paths, self._settings, told=self._told, seen=self._seen, sources=sources)
        self.source = "own"
        await watch.run()

    def _since(self) -> float:
        """What came since the service's last word: from the kernel's log, of the seconds in which nobody read it for us."""
        return self._heard_mono - OVERLAP_S if self._heard_mono else kmsg.now()

    async def _stop_own(self) -> None:
        own = self._own
        if own is not None:
            await _ended(own)
            self._own = None  # not before: whoever is cancelled meanwhile must not leave it to nobody

    def _told(self, finding: Finding) -> None:
        self._heard_mono = time.monotonic()
        if any(is_same(finding, each) for each in self._known):
            return
        self._known.append(finding)
        self._findings.append(finding)
        self._some.set()

    def _seen(self, snapshot: Snapshot) -> None:
        self._heard_mono = time.monotonic()
        self._snapshot = snapshot
        self._some.set()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # it has been seen


def _said(line: bytes) -> Finding | Snapshot | None:
    words = object_of(line)
    return parse(words.get("finding")) or document(words.get("snapshot"))


# -- once, for commands and preflight


def read_once(paths: Paths, timeout_s: float) -> Snapshot:
    """One snapshot, blocking for `timeout_s` at most: from gpu.sock, else from a sampler child. Where the driver hangs,
    `stuck_in` names the call; where there is no GPU, `source` is 'none'. Never raises."""
    deadline = time.monotonic() + timeout_s
    found = ask(paths, min(timeout_s, ANSWER_S))
    return found if found is not None and found.get("source") != "none" else _ask_child(paths, deadline)


def _ask_child(paths: Paths, deadline: float) -> Snapshot:
    stage = Stage()
    try:
        output, note = _run_once(stage, deadline)
    finally:
        name = stage.name if stage.since else ""
        stage.close()
    for line in output.splitlines():
        if (found := document(object_of(line).get("snapshot"))) is not None:
            return judged(found, paths)
    stuck = name or ("" if note else "the sampler itself")
    return {"schema": 1, "boot_id": boot_id(), "source": "none", "driver_version": "", "at": time.time(), "stuck_in": stuck, "gpus": [], "note": note}


def _run_once(stage: Stage, deadline: float) -> tuple[bytes, str]:
    """What it said, and why it could not be run."""
    try:
        child = subprocess.Popen(
            sampling.command(Options(), "--once", "--stage-fd", str(stage.fd)),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=sampling.environ(), pass_fds=[stage.fd], start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return b"", f"no sampler: {error.strerror}"
    assert child.stdout is not None
    with child.stdout:
        output = _read_until(child.stdout.fileno(), deadline)
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(1.0)
    if child.returncode is None:
        _LEFT.append(child)
    return output, ""


_LEFT: list[subprocess.Popen[bytes]] = []
"""Children in a driver's D state: SIGKILL is pending. Kept, so that no destructor complains of them."""


def _read_until(fd: int, deadline: float) -> bytes:
    poller, data = select.poll(), bytearray()
    poller.register(fd, select.POLLIN)
    while time.monotonic() < deadline and len(data) < _LINE_BYTES:
        if poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            piece = os.read(fd, _CHUNK)
            if not piece:
                break
            data += piece
    return bytes(data)


def judged(snapshot: Snapshot, paths: Paths) -> Snapshot:
    """With verdicts and quarantine, as the host unit would add them to a first look."""
    book, at = Book(), time.monotonic()
    book.snapshot(snapshot["gpus"], at, time.time())
    records = quarantine.read(paths)
    gpus = []
    for gpu in snapshot["gpus"]:
        record = records.get(str(gpu.get("uuid")))
        verdict = book.verdict(gpu, (record.cls, record.what, record.hint) if record else None, at)
        gpus.append({**gpu, "verdict": verdict, "quarantine": record.as_dict() if record else None})
    return {**snapshot, "gpus": gpus}
