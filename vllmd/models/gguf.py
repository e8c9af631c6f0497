"""Walks the header of a GGUF file: magic, counts, every key and every tensor's place, all against the file's size."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from vllmd.models.inventory import invalid, open_file

MAX_COUNT = 10_000_000
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


class _Wrong(Exception):
    """What is wrong with the header."""


@dataclass(slots=True)
class _Reader:
    data: mmap.mmap
    wide: bool
    """Lengths are u64; they were u32 in version 1."""
    at: int = 4

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise _Wrong("it ends within its header")

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self.data, start)[0])

    def length(self) -> int:
        return self.number("<Q" if self.wide else "<I")

    def count(self, what: str) -> int:
        value = self.length()
        if value > MAX_COUNT:
            raise _Wrong(f"it claims {value} {what}")
        return value

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            self.skip(self.length())
        elif kind == ARRAY and depth < 4:
            item, count = self.number("<I"), self.count("items in an array")
            if item in SIZES:
                self.skip(SIZES[item] * count)
            else:
                for _ in range(count):
                    self.value(item, depth + 1)
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise _Wrong(f"it has a value of unknown type {kind}")


def check(directory: Path, name: str) -> None:
    """ModelInvalid, naming the file, unless it is a GGUF whose header is whole and whose tensors begin inside it."""
    path = directory / name
    fd = open_file(directory, name)
    try:
        if os.fstat(fd).st_size < 24 or os.pread(fd, 4, 0) != b"GGUF":
            raise invalid(path, "is no GGUF file (it does not begin with GGUF)", code="model_corrupt")
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as data:
            _walk(data)
    except _Wrong as wrong:
        raise invalid(path, f"corrupt or truncated: {wrong}", code="model_corrupt") from None
    finally:
        os.close(fd)


def _walk(data: mmap.mmap) -> None:
    version = struct.unpack_from("<I", data, 4)[0]
    if not 1 <= version <= 100:
        raise _Wrong(f"it claims version {version}")
    reader = _Reader(data, wide=version > 1, at=8)
    tensors, keys = reader.count("tensors"), reader.count("keys")
    for _ in range(keys):
        reader.skip(reader.length())
        reader.value(reader.number("<I"))
    last = max((_tensor_offset(reader) for _ in range(tensors)), default=-1)
    if tensors and reader.at + last >= len(data):
        raise _Wrong(f"its last tensor begins at byte {reader.at + last} of {len(data)}")


def _tensor_offset(reader: _Reader) -> int:
    reader.skip(reader.length())
    dimensions = reader.number("<I")
    if dimensions > 8:
        raise _Wrong(f"it has a tensor of {dimensions} dimensions")
    reader.skip(dimensions * (8 if reader.wide else 4) + 4)
    return reader.number("<Q")
