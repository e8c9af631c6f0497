"""Hashes a model's files, streaming, on several threads (hashlib and blake3 release the interpreter's lock).

Measured: SHA-256 1.0 GB/s a core, BLAKE3 1.9 to 4; reading 3.2 GB cold by one mmap reader 6 to 16 s, by many threads of pread
2.8 s. Files are never mapped: one that is truncated meanwhile would end the process by SIGBUS.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllmd.errors import VllmdError
from vllmd.models.inventory import ModelFile, invalid, open_file
from vllmd.models.ioerrors import explained

CHUNK_BYTES = 2 << 20
AHEAD_BYTES = 8 << 20
"""What is asked of the disk beyond the bytes that are being hashed, by each thread: one that waits for every read leaves a disk
idle half of the time."""
MAX_THREADS = 8
REPORT_S = 0.5
LOWEST_NICE = 19


@dataclass(frozen=True, slots=True)
class Digest:
    """Hex; '' where it was not asked for."""

    sha256: str = ""
    blake3: str = ""


def _accept(_name: str, _digest: Digest) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Manner:
    """`drops`: what was read does not stay in the page cache. `polite_s`: so many seconds the threads stand behind everything
    else that runs, then they are like any other: on a machine that is busy for ever they would never end. `judge` is called
    with each file as soon as it is done; what it raises ends the pass."""

    drops: bool = False
    polite_s: float = 0.0
    judge: Callable[[str, Digest], None] = _accept


@dataclass(slots=True)
class _Job:
    """One file and how far it is: any thread can go on with it."""

    file: ModelFile
    hashers: Mapping[str, Any]
    offset: int = 0

    @property
    def digest(self) -> Digest:
        return Digest(**{algorithm: hasher.hexdigest() for algorithm, hasher in self.hashers.items()})


@dataclass(slots=True)
class _Work:
    """What the threads share. `error` is the first that any of them met."""

    directory: Path
    drops: bool
    waiting: deque[_Job]
    done: list[_Job] = field(default_factory=list)
    error: BaseException | None = None
    done_bytes: int = 0
    is_polite: bool = False
    stop: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    changed: threading.Event = field(default_factory=threading.Event)


def hash_files(
    directory: Path, wanted: Mapping[ModelFile, frozenset[str]], report: Callable[[int, int], None], manner: Manner = Manner()
) -> dict[str, Digest]:
    """{name: Digest} of the files, each by the algorithms ('sha256', 'blake3') that are wanted of it; by none: it is only read.

    `report(done_bytes, total_bytes)` is called twice a second, from this thread. A file that cannot be read, or became shorter,
    ends it at once, as a VllmdError.
    """
    total = sum(file.size for file in wanted)
    cores = len(os.sched_getaffinity(0))
    is_polite = manner.polite_s > 0
    jobs = [_Job(file, _hashers(wanted[file], _share(file.size, total, 1 if is_polite else cores))) for file in sorted(wanted, key=lambda file: -file.size)]
    work = _Work(directory, manner.drops, deque(jobs), is_polite=is_polite)
    count = min(MAX_THREADS, 2 * cores, len(jobs))
    threads = _start(work, count)
    polite_until = time.monotonic() + manner.polite_s
    judged = 0
    try:
        while judged < len(jobs):
            work.changed.wait(REPORT_S)
            work.changed.clear()
            if work.error is not None:
                raise work.error
            for job in work.done[judged:]:
                manner.judge(job.file.name, job.digest)
                judged += 1
            if work.is_polite and time.monotonic() >= polite_until:
                work.is_polite = False
                for thread in threads:  # each ends with its chunk, and puts its file back
                    thread.join()
                threads = _start(work, count)
            report(min(work.done_bytes, total), total)
    finally:
        work.stop = True
        for thread in threads:
            thread.join()
    return {job.file.name: job.digest for job in jobs}


def _share(size: int, total: int, cores: int) -> int:
    """How many cores hash a file: all of them where the others are done long before it, else a core a file is faster. Not where
    it is done politely: blake3's own threads do not know of that."""
    return cores if size > max(total / cores, CHUNK_BYTES) or size == total > CHUNK_BYTES else 1


def _hashers(algorithms: Iterable[str], cores: int) -> dict[str, Any]:
    return {algorithm: _new(algorithm, cores) for algorithm in algorithms}


def _new(algorithm: str, cores: int) -> Any:
    if algorithm == "sha256":
        return hashlib.sha256()
    from blake3 import blake3

    return blake3(max_threads=cores)


def _start(work: _Work, count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=_run, args=(work, work.is_polite), name=f"hash-{number}") for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def _run(work: _Work, is_polite: bool) -> None:  # noqa: FBT001 - a thread's
    """Until nothing waits. The nice value of a thread is its own on Linux, and its disk priority follows from it; who is not
    root can never raise it again, so polite threads hand over to new ones instead."""
    if is_polite:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_NICE)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        while (not is_polite or work.is_polite) and (job := _next(work)) is not None:
            with explained(f"read {work.directory / job.file.name}"):
                _read(work, job, buffer, is_polite=is_polite)
    except (VllmdError, OSError, MemoryError, ImportError) as error:
        work.error = work.error or error
        work.stop = True
        work.changed.set()


def _next(work: _Work) -> _Job | None:
    with work.lock:
        return work.waiting.popleft() if work.waiting and not work.stop else None


def _read(work: _Work, job: _Job, buffer: memoryview, *, is_polite: bool) -> None:
    """To the end of the file, or until it is put back for others."""
    fd = open_file(work.directory, job.file.name)
    try:
        ahead = job.offset
        while not work.stop and job.offset < job.file.size:
            if is_polite and not work.is_polite:
                with work.lock:
                    work.waiting.appendleft(job)
                return
            ahead = _ask_ahead(fd, job, ahead)
            _step(work, job, fd, buffer)
    finally:
        os.close(fd)
    if not work.stop:
        with work.lock:
            work.done.append(job)
        work.changed.set()


def _ask_ahead(fd: int, job: _Job, ahead: int) -> int:
    """The kernel takes no more than a disk's largest request at once, often 1 MiB."""
    while ahead < min(job.offset + AHEAD_BYTES, job.file.size):
        os.posix_fadvise(fd, ahead, 1 << 20, os.POSIX_FADV_WILLNEED)
        ahead += 1 << 20
    return ahead


def _step(work: _Work, job: _Job, fd: int, buffer: memoryview) -> None:
    size = os.preadv(fd, [buffer[: min(CHUNK_BYTES, job.file.size - job.offset)]], job.offset)
    if not size:
        reason = f"became shorter while it was read: {job.offset} of {job.file.size} bytes"
        raise invalid(work.directory / job.file.name, reason, "Wait until it is complete, then start again.")
    for hasher in job.hashers.values():
        hasher.update(buffer[:size])
    if work.drops:
        os.posix_fadvise(fd, job.offset, size, os.POSIX_FADV_DONTNEED)
    job.offset += size
    with work.lock:
        work.done_bytes += size
