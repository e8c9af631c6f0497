"""Reads the header of a safetensors file and compares it with the file's size. Not the library: checkers distrust the file.

Layout: u64 little-endian n, n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, then the tensors' bytes,
without gaps up to the end of the file. A truncated download differs in nothing but its size, and the engine would
find out after 30 to 50 s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllmd.models.inventory import invalid, open_file

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_SIZE = 1 << 63
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
BITS |= {"I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def check(directory: Path, name: str) -> None:
    """ModelInvalid, naming the file, unless the header is sound and its tensors fill the file exactly."""
    path = directory / name
    header, data_bytes = _read(path)
    spans = [_span(path, tensor, entry) for tensor, entry in header.items() if tensor != "__metadata__"]
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            what = "overlap" if begin < position else "leave a gap"
            raise invalid(path, f"corrupt: its tensors {what} at byte {begin} of the data", code="model_corrupt")
        position = end
    if position > data_bytes:
        missing = position - data_bytes
        raise invalid(path, f"truncated: {missing} bytes are missing at its end", code="model_truncated")
    if position < data_bytes:
        raise invalid(path, f"corrupt: {data_bytes - position} bytes follow its last tensor", code="model_corrupt")


def listed(path: Path, text: bytes) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape and bytes of each tensor that a header names. ModelInvalid, naming the file."""
    for tensor, entry in _parse(path, text).items():
        if tensor != "__metadata__":
            begin, end = _span(path, tensor, entry)
            yield tensor, entry["dtype"], tuple(entry["shape"]), end - begin


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes of data follow it in the file."""
    fd = open_file(path.parent, path.name)
    try:
        size = os.fstat(fd).st_size
        if size < 8:
            raise invalid(path, f"truncated: {size} bytes are no safetensors file", code="model_truncated")
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            reason = f"its header claims {length} bytes, in a file of {size}"
            raise invalid(path, f"truncated or not safetensors: {reason}", code="model_truncated")
        return _parse(path, os.pread(fd, length, 8)), size - 8 - length
    finally:
        os.close(fd)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise invalid(path, "corrupt: its header does not begin with '{'", code="model_corrupt")
    try:
        decoded = text.decode("utf-8")  # bytes would be taken as UTF-16 too, which no engine reads
        header: dict[str, Any] = json.loads(decoded)
        if _may_repeat(text, header):
            json.loads(decoded, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise invalid(path, f"corrupt: its header is not JSON ({str(error)[:200]})", code="model_corrupt") from None
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise invalid(path, "corrupt: its __metadata__ is no map of texts", code="model_corrupt")
    return header


def _may_repeat(text: bytes, header: dict[str, Any]) -> bool:
    """Whether a name could stand twice in one of its objects. Counting is free; a hook for every object would double the time.

    Each member has a colon, and each tensor that `_span` lets pass at least three members: where there are no more colons than
    that, nothing was there twice. A colon in a name or text only costs the second look."""
    metadata = header.get("__metadata__", {})
    tensors = len(header) - ("__metadata__" in header)
    members = len(header) + 3 * tensors + (len(metadata) if isinstance(metadata, dict) else 0)
    return text.count(b":") != members


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _span(path: Path, tensor: str, entry: object) -> tuple[int, int]:
    """Where its bytes are. Written out, without helpers or matching, for models of 100,000 tensors. Sizes have 63 bits at most: the
    product of a few thousand of 4,000 digits each would take for ever. An int is an int, and not a bool."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        is_right = type(dtype) is str and type(shape) is list and len(shape) <= MAX_DIMENSIONS
        if is_right and type(begin) is int and type(end) is int and 0 <= begin <= end < MAX_SIZE:
            elements = 1
            for size in shape:
                if type(size) is not int or not 0 <= size < MAX_SIZE:
                    break
                elements *= size
            else:
                if _fits(dtype, elements, end - begin):
                    return begin, end
    except (TypeError, KeyError, ValueError):
        pass
    raise invalid(path, f"corrupt: its header is wrong about tensor {tensor[:100]!r}", code="model_corrupt")


def _fits(dtype: str, elements: int, data_bytes: int) -> bool:
    """Whether they take these bytes; a type newer than this table is left to the engine."""
    bits = BITS.get(dtype)
    return bits is None or (elements * bits + 7) // 8 == data_bytes
