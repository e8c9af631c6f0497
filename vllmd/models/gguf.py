"""Walks the header of a GGUF file: magic, counts, every key and every tensor's place, all against the file's size.

Layout, little-endian: "GGUF", u32 version, u64 tensors, u64 keys, then the keys (name, type, value), the tensors (name,
dimensions, type, offset), padding to the alignment, and the data, where each tensor lies at its offset.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from vllmd.models.inventory import invalid, open_file

MAX_COUNT = 10_000_000
"""Of items, in one array and in all: what one header makes us do has an end."""
MAX_ENTRIES = 1_000_000
"""Of keys, and of tensors."""
MAX_DIMENSIONS = 8
MAX_VERSION = 100
MAX_ALIGNMENT = 1 << 20
FIRST_BYTES, MAX_HEADER_BYTES = 4 << 20, 1 << 30
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
U32, STRING, ARRAY = 4, 8, 9
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)}
BLOCKS |= {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)}
BLOCKS |= {16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136)}
BLOCKS |= {24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17)}
"""Tensor type -> (elements, bytes) of a block. Of a type that does not stand here only the beginning is checked."""


class _Wrong(Exception):
    """What is wrong with the header."""


class _More(Exception):
    """The header goes on behind what was read of the file."""


@dataclass(slots=True)
class _Reader:
    """`data` is the beginning of a file of `size` bytes; `left` how many items may still come."""

    data: bytes
    size: int
    wide: bool
    """Lengths are u64; they were u32 in version 1."""
    at: int = 8
    left: int = MAX_COUNT

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise _Wrong("it ends within its header") if self.at > self.size else _More

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self.data, start)[0])

    def length(self) -> int:
        return self.number("<Q" if self.wide else "<I")

    def count(self, what: str, most: int) -> int:
        value = self.length()
        if value > most:
            raise _Wrong(f"it claims {value} {what}")
        return value

    def text(self) -> bytes:
        start = self.at + (8 if self.wide else 4)
        self.skip(self.length())
        return self.data[start : self.at]

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            self.skip(self.length())
        elif kind == ARRAY and depth < 4:
            self._array(depth)
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise _Wrong(f"it has a value of unknown type {kind}")

    def _array(self, depth: int) -> None:
        item, count = self.number("<I"), self.count("items in an array", MAX_COUNT)
        if item in SIZES:
            self.skip(SIZES[item] * count)
            return
        self.left -= count
        if self.left < 0:
            raise _Wrong(f"its arrays have more than {MAX_COUNT} items")
        for _ in range(count):
            self.value(item, depth + 1)


def check(directory: Path, name: str) -> None:
    """ModelInvalid, naming the file, unless it is a GGUF whose header is whole and whose tensors lie inside it. OSError."""
    path = directory / name
    fd = open_file(directory, name)
    try:
        size = os.fstat(fd).st_size
        if size < 24 or os.pread(fd, 4, 0) != b"GGUF":
            raise invalid(path, "is no GGUF file (it does not begin with GGUF)", code="model_corrupt")
        _check(fd, size)
    except _Wrong as wrong:
        raise invalid(path, f"corrupt or truncated: {wrong}", code="model_corrupt") from None
    finally:
        os.close(fd)


def _check(fd: int, size: int) -> None:
    """Reads as much as the header takes. Not mapped: a failing disk, or a file that shrinks, would kill the process."""
    wanted = FIRST_BYTES
    while True:
        data = _read(fd, min(wanted, size))
        try:
            _walk(data, size)
        except _More:
            if wanted >= MAX_HEADER_BYTES:
                raise _Wrong(f"its header is longer than {MAX_HEADER_BYTES} bytes") from None
            wanted *= 8
        else:
            return


def _read(fd: int, size: int) -> bytes:
    """One read gives 2 GiB at most, and fewer than were asked for where a signal came."""
    parts, at = [], 0
    while at < size:
        part = os.pread(fd, size - at, at)
        if not part:
            raise _Wrong("it became shorter while it was read")
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _walk(data: bytes, size: int) -> None:
    version = _version(data)
    reader = _Reader(data, size, wide=version > 1)
    tensors, keys = reader.count("tensors", MAX_ENTRIES), reader.count("keys", MAX_ENTRIES)
    alignment = 32
    for _ in range(keys):
        name, kind = reader.text(), reader.number("<I")
        start = reader.at
        reader.value(kind)
        if name == b"general.alignment" and kind == U32:
            alignment = int.from_bytes(data[start : reader.at], "little")
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _Wrong(f"it claims an alignment of {alignment}")
    places = [_tensor(reader, alignment) for _ in range(tensors)]
    begin = -(-reader.at // alignment) * alignment
    for offset, length in places:
        if begin + offset + length > size:
            missing = begin + offset + length - size
            raise _Wrong(f"a tensor begins at byte {begin + offset} and ends at {begin + offset + length} of {size}: {missing} bytes are missing")


def _version(data: bytes) -> int:
    version = int.from_bytes(data[4:8], "little")
    if 1 <= version <= MAX_VERSION:
        return version
    if 1 <= int.from_bytes(data[4:8], "big") <= MAX_VERSION:
        raise _Wrong("it is big-endian, made for another kind of machine: no engine here reads it")
    raise _Wrong(f"it claims version {version}")


def _tensor(reader: _Reader, alignment: int) -> tuple[int, int]:
    """Offset and length of its data in bytes; length 1 where its type is not known."""
    reader.skip(reader.length())
    dimensions = reader.number("<I")
    if dimensions > MAX_DIMENSIONS:
        raise _Wrong(f"it has a tensor of {dimensions} dimensions")
    shape = [reader.length() for _ in range(dimensions)]
    kind, offset = reader.number("<I"), reader.number("<Q")
    if offset % alignment:
        raise _Wrong(f"it has a tensor at offset {offset}, which is no multiple of {alignment}")
    elements, block_bytes = BLOCKS.get(kind, (1, 0))
    if not block_bytes:
        return offset, 1
    row = shape[0] if shape else 1
    if row % elements:
        raise _Wrong(f"it has a tensor of type {kind} with rows of {row} elements, which is no multiple of {elements}")
    return offset, math.prod(shape) // elements * block_bytes
