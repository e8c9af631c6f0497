"""Fetches a listing into a stage: threads that move bytes, threads that hash behind them, and one that watches both.

    Work (parts) -> Worker threads (ask, splice into the file) -> Hashers (sums from the page cache) -> files/

Everything that goes wrong ends up in `Work.fail`, ends all threads, and is raised here. At whatever instant the process is
killed, the journal says less than is on the disk, never more.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vllmd.errors import ModelInvalid
from vllmd.models.hashing import Digest
from vllmd.models.progress import Progress
from vllmd.models.remote import Listing, RemoteFile, Transport, known_sums
from vllmd.models.stage import Stage
from vllmd.models.transfer import tls
from vllmd.models.transfer.client import Client
from vllmd.models.transfer.hashers import Hashers, Hashing
from vllmd.models.transfer.journal import Kept
from vllmd.models.transfer.meter import Meter
from vllmd.models.transfer.watch import Watch
from vllmd.models.transfer.work import Ended, Task, Work
from vllmd.models.transfer.worker import Manner, Worker
from vllmd.system.files import storage_error

LOOK_S = 0.1
REPORT_S = 0.5
SMALL_BYTES = 4 << 20
WRONG_TWICE = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """`attempts` in a row without progress end the fetch; `back_off_s` is the wait after the first. `hashes` off: nothing is
    verified but sizes, for measuring."""

    connections: int
    stall_s: float
    attempts: int = 6
    back_off_s: float = 0.5
    hashes: bool = True


def download(
    listing: Listing,
    transport: Transport,
    stage: Stage,
    limits: Limits,
    environ: Mapping[str, str],
    report: Callable[[Progress], None],
    log: Callable[[str], None],
) -> Mapping[str, Digest]:
    """Both sums of every file of the listing, all of them complete and verified in `stage.files`.

    SourceUnavailable where asking again may help; ModelInvalid for bytes that stay wrong; PermissionMissing and ModelNotFound for what the
    server refuses; StorageFailed; ConfigError for a proxy or a CA bundle that is none. What is good stays in the stage.
    """
    return _Fetch(listing, transport, stage, limits, environ, log).run(report)


class _Fetch:
    def __init__(
        self, listing: Listing, transport: Transport, stage: Stage, limits: Limits, environ: Mapping[str, str], log: Callable[[str], None]
    ) -> None:
        self._stage, self._limits, self._origin, self._log = stage, limits, listing.origin, log
        self._transport, self._environ = transport, environ
        self._digests = dict(stage.have())
        tasks = [_task(file, stage.kept.get(file.name)) for file in listing.files if file.name not in self._digests]
        # An empty file is asked of nobody: there is nothing that could come.
        self._begun = [task for task in tasks if task.done.bytes or not task.file.size]
        self._work = Work(tasks, limits.connections)
        self._watch = Watch(limits.stall_s)
        self._hashers = Hashers(self._hashing, self._finish, self._work.ended.is_set)
        self._meter = Meter(listing.bytes - stage.remaining_bytes(listing), listing.bytes)

    def run(self, report: Callable[[Progress], None]) -> Mapping[str, Digest]:
        secure = tls.context(self._environ)
        bodies = [self._hashers.run] * min(self._limits.connections, os.cpu_count() or 1)
        bodies += [lambda: self._worker(secure).run()] * self._limits.connections
        threads = [threading.Thread(target=self._guarded, args=(body,)) for body in bodies]
        with self._stage.journal:
            try:
                for task in self._begun:
                    self._hashers.add(task)
                for thread in threads:
                    thread.start()
                self._look(report)
            finally:
                self._end(threads)
        if self._work.error is not None:
            raise self._work.error
        return self._digests

    def _look(self, report: Callable[[Progress], None]) -> None:
        reported = 0.0
        while not self._work.wait(LOOK_S):
            self._watch.look()
            if time.monotonic() - reported >= REPORT_S:
                reported = time.monotonic()
                report(self._meter.look())
        report(self._meter.look())

    def _end(self, threads: list[threading.Thread]) -> None:
        """No thread is left: a connection that waits is shut down under it. A name that is being looked up takes as long as
        the resolver gives it."""
        if not self._work.is_over:
            self._work.fail(Ended())
        self._hashers.close()
        self._watch.end()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        self._work.close()

    def _guarded(self, body: Callable[[], None]) -> None:
        """A thread's life: whatever goes wrong in it ends the fetch."""
        try:
            body()
        except BaseException as error:
            self._work.fail(error)
            self._hashers.close()

    def _worker(self, secure: ssl.SSLContext) -> Worker:
        manner = Manner(
            attempts=self._limits.attempts,
            back_off_s=self._limits.back_off_s,
            origin=self._origin,
            prepare=self._prepare,
            came=self._came,
            lost=self._meter.lost,
            note=lambda task, begin, end: self._stage.journal.part(task.name, begin, end),
            landed=self._landed,
            log=self._log,
        )
        return Worker(self._work, self._transport, Client(self._watch, secure, self._environ), manner)

    def _prepare(self, task: Task) -> None:
        """Open its file, and let it be hashed."""
        with task.lock:
            if task.fd >= 0:
                return
            path = self._stage.part_path(task.name)
            try:
                task.fd = _opened(path)
                if not task.done.bytes:
                    os.ftruncate(task.fd, 0)
            except OSError as error:
                raise storage_error(error, f"write {path}") from error
        task.file = replace(task.file, sums=known_sums(self._transport, task.file))
        if task.done.bytes:
            self._log(f"{task.name}: {task.done.bytes} of {task.file.size} bytes are here from an earlier attempt")
        else:
            self._stage.journal.began(task.name, self._stage.marks[task.name], task.file.size)
        self._hashers.add(task)

    def _came(self, task: Task, begin: int, end: int) -> None:
        with task.lock:
            task.done.add(begin, end)
        self._meter.moved(end - begin)
        if task.file.size > SMALL_BYTES and (self._limits.hashes or task.is_fetched):
            self._hashers.came(task)

    def _landed(self, task: Task, buffer: memoryview) -> None:
        """A small file is hashed where it was fetched, which spares waking a thread for each."""
        if task.file.size <= SMALL_BYTES:
            self._hashers.now(task, buffer)

    def _hashing(self, task: Task) -> Hashing:
        return Hashing(task, self._prepare, self._note_sum, self._doubt, is_off=not self._limits.hashes)

    def _note_sum(self, task: Task, offset: int, blake3: str) -> None:
        self._stage.journal.sum(task.name, offset, blake3)

    def _doubt(self, task: Task, begin: int, end: int) -> None:
        self._log(f"{task.name}: bytes {begin} to {end} are not what an earlier attempt wrote; fetched again")
        self._anew(task, begin, min(end, task.file.size))

    def _anew(self, task: Task, begin: int, end: int) -> None:
        self._meter.lost(self._work.again(task, begin, end))
        # The journal takes nothing back: it begins the file anew, with what is still believed.
        self._stage.journal.began(task.name, self._stage.marks[task.name], task.file.size)
        for low, high in list(task.done):
            self._stage.journal.part(task.name, low, high)

    def _finish(self, hashing: Hashing) -> None:
        """By the thread that hashed its last byte: compare the sums, and give it its name."""
        task = hashing.task
        wrong = hashing.wrong()
        if wrong:
            self._reject(hashing, wrong)
            return
        digest = hashing.digest
        path = self._stage.part_path(task.name)
        try:
            final = self._stage.final_path(task.name)
            # noted first: killed between the two, the next attempt renames it
            if self._limits.hashes:
                self._stage.journal.done(task.name, digest, os.fstat(task.fd))
            path.rename(final)
        except OSError as error:
            raise storage_error(error, f"rename {path}") from error
        self._digests[task.name] = digest
        self._log(f"{task.name}: complete, {task.file.size} bytes, sha256 {digest.sha256}")
        self._work.finish(task)

    def _reject(self, hashing: Hashing, wrong: str) -> None:
        task = hashing.task
        task.failures += 1
        if task.failures >= WRONG_TWICE:
            what = f"{task.name} of {self._origin} is not what was listed, twice: {wrong}"
            raise ModelInvalid("model_corrupt", what, "The source gives wrong bytes: upload the file there again, or look at what lies between (proxy, cache).")
        self._log(f"{task.name}: {wrong}; fetched anew")
        task.proven.clear()
        hashing.restart()
        self._anew(task, 0, task.file.size)


def _task(file: RemoteFile, kept: Kept | None) -> Task:
    return Task(file) if kept is None else Task(file, kept.ranges, dict(kept.sums))


def _opened(path: Path) -> int:
    """Root may run this once for a store of the service's: the file gets the owner of its directory."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)
    return fd
