"""What a stage remembers of its files, in one file that is only appended to while a download runs.

    CRC32 of the rest, a space, and a JSON array, one a line:
    ["boot", ID]                      the next lines were written under this boot
    ["file", NAME, MARK, SIZE]        it begins (again): nothing of it is there
    ["part", NAME, BEGIN, END]        these bytes are there
    ["sum", NAME, OFFSET, BLAKE3]     of the bytes [0, OFFSET), as they were hashed on the way
    ["done", NAME, SIZE, MTIME_NS, INODE, SHA256, BLAKE3]   complete and verified

Nothing is fsynced, and nothing need be. As long as the same boot runs, a killed process loses no byte that it wrote. After
a power cut the file system may have kept a line and lost the bytes that it speaks of, so then only what has a sum is
believed, and that sum is computed again from the disk before the file counts as complete. A line that is damaged says nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from vllmd.models.hashing import Digest
from vllmd.models.transfer.ranges import Ranges
from vllmd.system.files import read_small, write_atomic

LIMIT_BYTES = 256 << 20
RESERVE_BYTES = 64 << 10
"""Taken ahead, so that what was fetched can still be noted when the disk is full."""


@dataclass(slots=True)
class Kept:
    """What is there of one file. `sums`: offset -> BLAKE3 of the bytes before it. `done`: the digests, and (size, mtime_ns,
    inode) of the file that had them."""

    mark: str
    size: int
    ranges: Ranges = field(default_factory=Ranges)
    sums: dict[int, str] = field(default_factory=dict)
    done: tuple[Digest, tuple[int, int, int]] | None = None
    boot: str = ""


class Journal:
    """As a context manager it holds its file open; appending works from any thread, also outside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._fd = -1
        self._end = self._reserved = 0

    def __enter__(self) -> Journal:
        self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def read(self) -> dict[str, Kept]:
        """{name: what is there}, as far as it can be believed. OSError, but not where there is none, or no such file."""
        try:
            data = read_small(self.path, LIMIT_BYTES)
        except FileNotFoundError:
            return {}
        return replayed(data, boot_id())

    def rewrite(self, kept: dict[str, Kept]) -> None:
        """Replace it by the short form. OSError."""
        lines = [_line("boot", boot_id())]
        for name, what in kept.items():
            lines.append(_line("file", name, what.mark, what.size))
            lines += [_line("part", name, begin, end) for begin, end in what.ranges]
            lines += [_line("sum", name, offset, blake3) for offset, blake3 in sorted(what.sums.items())]
            if what.done is not None:
                lines.append(_done(name, *what.done))
        write_atomic(self.path, b"".join(lines), fsync=False)

    def began(self, name: str, mark: str, size: int) -> None:
        self._append(_line("file", name, mark, size))

    def part(self, name: str, begin: int, end: int) -> None:
        self._append(_line("part", name, begin, end))

    def sum(self, name: str, offset: int, blake3: str) -> None:
        self._append(_line("sum", name, offset, blake3))

    def done(self, name: str, digest: Digest, status: os.stat_result) -> None:
        self._append(_done(name, digest, signature(status)))

    def _append(self, line: bytes) -> None:
        """What cannot be noted is fetched once more by the next attempt; it fails nothing."""
        with self._lock, contextlib.suppress(OSError):
            held = self._fd >= 0
            if not held:
                self._open()
            try:
                self._write(line)
            finally:
                if not held:
                    self._close()

    def _write(self, line: bytes) -> None:
        if self._end + len(line) > self._reserved:
            with contextlib.suppress(OSError):
                os.posix_fallocate(self._fd, self._reserved, RESERVE_BYTES)
                self._reserved += RESERVE_BYTES
        self._end += os.pwrite(self._fd, line, self._end)

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._reserved = os.fstat(self._fd).st_size
        tail = os.pread(self._fd, self._reserved, 0).rstrip(b"\0") if self._reserved else b""
        self._end = len(tail)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _line(*fields: object) -> bytes:
    text = json.dumps(fields, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _done(name: str, digest: Digest, signed: tuple[int, int, int]) -> bytes:
    return _line("done", name, *signed, digest.sha256, digest.blake3)


def replayed(data: bytes, boot: str) -> dict[str, Kept]:
    """Pure: what the lines say, seen from under `boot`."""
    kept: dict[str, Kept] = {}
    written_under = ""
    for line in data.split(b"\n"):
        fields = _fields(line)
        if fields and fields[0] == "boot":
            written_under = str(fields[1])
        elif fields:
            with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
                _replay(kept, fields, written_under)
    for what in kept.values():
        if what.boot != boot:
            _believe_sums_only(what)
    return kept


def _fields(line: bytes) -> list[Any]:
    try:
        if int(line[:8], 16) != zlib.crc32(line[9:]):
            return []
        fields = json.loads(line[9:])
        return fields if isinstance(fields, list) and len(fields) > 1 else []
    except (ValueError, RecursionError):
        return []


def _replay(kept: dict[str, Kept], fields: list[Any], boot: str) -> None:
    match fields:
        case ["file", str(name), str(mark), int(size)]:
            kept[name] = Kept(mark, size, boot=boot)
        case ["part", str(name), int(begin), int(end)] if 0 <= begin < end <= kept[name].size:
            kept[name].ranges.add(begin, end)
        case ["sum", str(name), int(offset), str(blake3)] if 0 <= offset <= kept[name].size:
            kept[name].sums[offset] = blake3
        case ["done", str(name), int(size), int(mtime_ns), int(inode), str(sha256), str(blake3)] if size == kept[name].size:
            kept[name].ranges = Ranges([(0, size)])
            kept[name].sums[size] = blake3
            kept[name].done = Digest(sha256, blake3), (size, mtime_ns, inode)


def _believe_sums_only(what: Kept) -> None:
    proven = max((offset for offset in what.sums if offset <= what.ranges.prefix), default=0)
    what.ranges = Ranges([(0, proven)])
    what.sums = {offset: blake3 for offset, blake3 in what.sums.items() if offset <= proven}
    what.done = None

