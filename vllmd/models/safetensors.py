"""Reads the header of a safetensors file and compares it with the file's size. Not the library: checkers distrust the file.

Layout: u64 little-endian n, n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, then the tensors' bytes,
without gaps up to the end of the file. A truncated download differs in nothing but its size, and the engine would
find out after 30 to 50 s.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from vllmd.models.inventory import invalid, open_file

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
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
        if _may_repeat(text, len(header) - ("__metadata__" in header)):
            json.loads(decoded, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise invalid(path, f"corrupt: its header is not JSON ({str(error)[:200]})", code="model_corrupt") from None
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise invalid(path, "corrupt: its __metadata__ is no map of texts", code="model_corrupt")
    return header


def _may_repeat(text: bytes, tensors: int) -> bool:
    """Whether a name could stand in the header twice. Counting is free; a hook for every object would double the time."""
    return text.count(b'"data_offsets"') != tensors or b"\\" in text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _span(path: Path, tensor: str, entry: object) -> tuple[int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        are_right = type(shape) is list and type(dtype) is str and _is_size(begin) and _is_size(end) and begin <= end
        if are_right and len(shape) <= MAX_DIMENSIONS and all(map(_is_size, shape)) and _fits(dtype, shape, end - begin):
            return begin, end
    except (TypeError, KeyError, ValueError):
        pass
    raise invalid(path, f"corrupt: its header is wrong about tensor {tensor[:100]!r}", code="model_corrupt")


def _is_size(size: object) -> bool:
    """Of 64 bits: the product of a few thousand sizes of 4,000 digits each would take for ever."""
    return type(size) is int and 0 <= size < 1 << 63


def _fits(dtype: str, shape: list[int], data_bytes: int) -> bool:
    """Whether the shape takes these bytes; a type newer than this table is left to the engine."""
    bits = BITS.get(dtype)
    return bits is None or (math.prod(shape) * bits + 7) // 8 == data_bytes
