"""GGUF: every way in which its header can be wrong, long or incomplete."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from tests.gguf_files import KEY, PADDING, TENSOR, gguf, text
from tests.refusals import refusal
from vllmd.models import gguf as gguf_format
from vllmd.models.validate import Checks, validate

pytestmark = pytest.mark.unit


def block(kind: int, elements: int, *, offset: int = 0, data: int = 0, keys: bytes = b"", count: int = 0) -> bytes:
    """A file with one tensor, and `data` bytes after the padding."""
    entry = text("t") + struct.pack("<IQIQ", 1, elements, kind, offset)
    head = gguf(keys, entry, counts=(1, count))
    return head + bytes(-len(head) % 32) + bytes(data)


def alignment(value: int) -> bytes:
    return text("general.alignment") + struct.pack("<II", 4, value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gguf(KEY, TENSOR + PADDING, counts=(1, 2), data=b"x" * 16), ""),
        (gguf(KEY, TENSOR + PADDING, counts=(1, 2), data=b"x" * 15), "1 bytes are missing"),
        (block(12, 512, data=288), ""),
        (block(12, 512, data=287), "1 bytes are missing"),
        (block(12, 500, data=288), "no multiple of 256"),
        (block(2, 64, offset=64, data=64 + 36), ""),
        (block(2, 64, offset=64, data=64 + 35), "1 bytes are missing"),
        (block(2, 64, offset=33, data=200), "no multiple of 32"),
        (gguf(b"", text("t") + struct.pack("<IIQ", 0, 2, 0), counts=(1, 0), data=bytes(99)), "rows of 1 elements"),
        (block(999, 1 << 60, data=1), ""),
        (block(999, 1 << 60), "are missing"),
        (block(0, 1 << 63, data=1), "are missing"),
        (block(0, 8, offset=8, data=40, keys=alignment(8), count=1), ""),
        (block(0, 8, data=40, keys=alignment(0), count=1), "alignment of 0"),
        (block(0, 8, data=40, keys=alignment(48), count=1), "alignment of 48"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (gguf(text("k") + struct.pack("<IIQ", 9, 9, 2) + struct.pack("<IQ", 8, 6_000_000) * 2, counts=(0, 1)), "ends within"),
        (b"GGML" + b"x" * 100, "does not begin with GGUF"),
        (gguf()[:20], "does not begin with GGUF"),
        (gguf(version=0), "version 0"),
        (gguf(version=101), "version 101"),
        (gguf(counts=(10**8, 0)), "100000000 tensors"),
        (gguf(counts=(0, 2**63)), "keys"),
        (gguf(KEY[:20], counts=(0, 2)), "ends within its header"),
        (gguf(text("k") + struct.pack("<IIQ", 9, 4, 10**9), counts=(0, 1)), "items in an array"),
        (gguf(text("k") + struct.pack("<I", 99), counts=(0, 1)), "unknown type 99"),
        (gguf(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50, counts=(0, 1)), "unknown type 9"),
        (gguf(b"", TENSOR, counts=(1, 0)), "are missing"),
        (gguf(struct.pack("<Q", 2**63), counts=(0, 1)), "ends within its header"),
    ],
)
def test_gguf(model: Path, content: bytes, said: str) -> None:
    (model / "model.gguf").write_bytes(content)
    if said:
        assert said in refusal(model).what
    else:
        validate(model, Checks())


def test_gguf_whose_header_is_longer_than_the_first_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_format, "FIRST_BYTES", 30)
    content = gguf(KEY, TENSOR + PADDING, counts=(1, 2), data=b"x" * 16)
    (model / "model.gguf").write_bytes(content)
    validate(model, Checks())
    (model / "model.gguf").write_bytes(content[:-1])
    assert "1 bytes are missing" in refusal(model).what
    monkeypatch.setattr(gguf_format, "MAX_HEADER_BYTES", 30)
    assert "longer than 30 bytes" in refusal(model).what


def test_gguf_with_a_vocabulary_takes_milliseconds(model: Path) -> None:
    words = b"".join(text(str(number)) for number in range(250_000))
    key = text("tokens") + struct.pack("<IIQ", 9, 8, 250_000) + words
    (model / "model.gguf").write_bytes(gguf(key, counts=(0, 1)))
    started = time.process_time()
    validate(model, Checks())
    assert time.process_time() - started < 3  # 0.2 s on an idle machine


def test_part_of_a_split_gguf_is_missed(model: Path) -> None:
    (model / "big-00001-of-00002.gguf").write_bytes(gguf())
    assert "big-00002-of-00002.gguf" in refusal(model).what
