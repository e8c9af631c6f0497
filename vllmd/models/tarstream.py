"""One tar of plain files, written and read as a stream, without seeking.

What is written is what any tar reads (POSIX pax), the same bytes for the same files. What is read is hostile: plain files only,
names and sizes for the caller to judge, nothing buffered but one header.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from tarfile import BLOCKSIZE

END = bytes(2 * BLOCKSIZE)
_PAX_LIMIT_BYTES = 1 << 16
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a directory",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class TarDamaged(ValueError):
    """What is wrong, as what follows on the archive's name."""


class TarEnds(TarDamaged):
    """The stream ended too early."""


def header(name: str, size: int) -> bytes:
    """What stands before a file's bytes; `padding` comes after them."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    return bytes(-size % BLOCKSIZE)


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    size: int


@dataclass(slots=True)
class Reader:
    """`read(count)` gives that many bytes, fewer only at the end. After each member its `size` bytes are to be taken."""

    read: Callable[[int], bytes]
    left: int = 0
    pad: int = 0

    def next(self) -> Member | None:
        """The next file; None at the end of the archive. TarDamaged."""
        self._exactly(self.left + self.pad)
        name, size = "", -1
        while True:
            block = self.read(BLOCKSIZE)
            if not block or block == END[:BLOCKSIZE]:
                return None
            info = _header(block)
            if info.type != tarfile.XHDTYPE:
                break
            name, size = _pax(self._exactly(info.size, _PAX_LIMIT_BYTES), name, size)
            self._exactly(-info.size % BLOCKSIZE)
        member = Member(name or info.name, size if size >= 0 else info.size)
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise TarDamaged(f"holds {member.name[:200]!r}, which is {_KINDS.get(info.type, 'no plain file')}")
        self.left, self.pad = member.size, -member.size % BLOCKSIZE
        return member

    def take(self, count: int) -> bytes:
        """Up to `count` of the member's bytes, none after the last. TarEnds."""
        data = self.read(min(count, self.left))
        if not data and self.left:
            raise TarEnds("is truncated")
        self.left -= len(data)
        return data

    def _exactly(self, count: int, limit: int = 1 << 62) -> bytes:
        if not 0 <= count <= limit:
            raise TarDamaged(f"has a header of {count} bytes")
        data = self.read(count) if count else b""
        if len(data) < count:
            raise TarEnds("is truncated")
        return data


def _header(block: bytes) -> tarfile.TarInfo:
    for magic, kind in _COMPRESSED.items():
        if block.startswith(magic):
            raise TarDamaged(f"is compressed with {kind}: give the tar itself, as in {kind} -dc FILE | vllmctl store import -")
    if len(block) < BLOCKSIZE:
        raise TarEnds("is truncated")
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarDamaged(f"is no tar, or damaged: {error}") from None
    if info.size < 0:
        raise TarDamaged("has a file of a negative size")
    return info


def _pax(data: bytes, name: str, size: int) -> tuple[str, int]:
    """The name and the size that a pax header gives the next member; what else it says is nothing to us."""
    found = _records(data)
    try:
        name = found[b"path"].decode("utf-8", "surrogateescape") if b"path" in found else name
        size = int(found[b"size"]) if b"size" in found else size
    except ValueError:
        raise TarDamaged("has a damaged pax header") from None
    if size < -1:
        raise TarDamaged("has a file of a negative size")
    return name, size


def _records(data: bytes) -> Mapping[bytes, bytes]:
    """`LENGTH KEY=VALUE\\n`, one after another."""
    found: dict[bytes, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 8 or not len(length) < int(length) <= len(data):
            raise TarDamaged("has a damaged pax header")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key] = value
        data = data[int(length) :]
    return found
