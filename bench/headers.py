"""Validation of a model of many shards: every header read, every offset compared with the file's size.

    python -m bench.headers
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.table import Figure, compared, render
from vllmd.models import demo
from vllmd.models.validate import Checks, validate

SHARDS, TENSORS, ROUNDS = 100, 90, 20
BAR_MS = 30.0


def _make(directory: Path) -> None:
    """Sparse: the tensors' bytes are holes, which nothing here reads."""
    demo.make(directory, shards=1)
    (directory / "model.safetensors").unlink()
    entry_bytes = 1 << 20
    weight_map = {}
    for shard in range(1, SHARDS + 1):
        name = f"model-{shard:05}-of-{SHARDS:05}.safetensors"
        header = {"__metadata__": {"format": "pt"}}
        for tensor in range(TENSORS):
            key = f"model.layers.{shard}.mlp.experts.{tensor}.gate_proj.weight"
            place = [tensor * entry_bytes, (tensor + 1) * entry_bytes]
            header[key] = {"dtype": "BF16", "shape": [1024, 512], "data_offsets": place}  # type: ignore[dict-item]
            weight_map[key] = name
        text = json.dumps(header).encode()
        with open(directory / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + TENSORS * entry_bytes)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _times_ms(work: Callable[[], object]) -> list[float]:
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _plain(directory: Path) -> None:
    """json and struct alone, which check nothing."""
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def run() -> list[Figure]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="vllmd-bench-", dir=memory if memory.is_dir() else None) as name:
        directory = Path(name)
        _make(directory)
        plain = _times_ms(lambda: _plain(directory))
        checked = _times_ms(lambda: validate(directory, Checks()))
    against = compared("json and struct alone", plain, "ms")
    return [Figure(f"validation of a model of {SHARDS} shards x {TENSORS} tensors", checked, "ms", BAR_MS, against=against)]


if __name__ == "__main__":
    print(render(run()))
