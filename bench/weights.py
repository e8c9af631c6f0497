"""Models of a given size without a real one: true headers, sparse data, or random data that no file system can shrink."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from vllmd.models import demo

BLOCK_BYTES = 64 << 20


def make(directory: Path, *, shards: int, shard_bytes: int, tensors: int = 90, sparse: bool) -> Path:
    """A whole model in `directory`, of `shards` files of exactly `shard_bytes` with `tensors` bf16 tensors each."""
    demo.make(directory, shards=1)
    (directory / "model.safetensors").unlink()
    block = b"" if sparse else os.urandom(min(BLOCK_BYTES, shard_bytes))
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = [f"model.layers.{shard}.block.{number}.weight" for number in range(tensors)]
        header = _header(names, shard_bytes)
        with (directory / name).open("wb") as file:
            file.write(header)
            for begin in range(len(header), shard_bytes if block else 0, len(block) or 1):
                # Not the same bytes in two places of one file: a part that lands in the wrong one must not go unseen.
                file.write(struct.pack("<QQ", shard, begin)[: shard_bytes - begin])
                file.write(block[16 : shard_bytes - begin])
            file.truncate(shard_bytes)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": shards * shard_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _header(names: list[str], size: int) -> bytes:
    """With spaces at its end, as the format allows: the data of two bytes an element must fill the file exactly."""
    space = 8 + (200 * len(names) + 7) // 8 * 8
    elements = (size - space) // 2
    share, entries, begin = elements // len(names), {}, 0
    for number, name in enumerate(names):
        count = share if number + 1 < len(names) else elements - share * (len(names) - 1)
        entries[name] = {"dtype": "BF16", "shape": [count], "data_offsets": [begin, begin + 2 * count]}
        begin += 2 * count
    length = size - begin - 8
    return struct.pack("<Q", length) + json.dumps(entries).encode().ljust(length)
