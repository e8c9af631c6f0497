"""GGUF files by hand: their header's parts."""

from __future__ import annotations

import struct


def gguf(keys: bytes = b"", tensors: bytes = b"", version: int = 3, counts: tuple[int, int] = (0, 0), data: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + keys + tensors + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


KEY = text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b") + text("n") + struct.pack("<II", 4, 7)
TENSOR = text("t") + struct.pack("<IQIQ", 1, 4, 0, 0)
PADDING = bytes(-(24 + len(KEY) + len(TENSOR)) % 32)
