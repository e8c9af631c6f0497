"""How fast a model is hashed that lies in memory: in eight shards, and in one file."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from bench import weights
from bench.place import BenchError
from bench.table import Figure
from vllmd.models.hashing import hash_files
from vllmd.models.inventory import take

TOTAL_BYTES = 3_000_000_000
BAR_GB_S = 3.0
ROUNDS = 5
MEMORY = Path("/dev/shm")


def run() -> list[Figure]:
    if shutil.disk_usage(MEMORY).free < 2 * TOTAL_BYTES:
        raise BenchError(f"{MEMORY} has not twice {TOTAL_BYTES} bytes free")
    return [_figure("3 GB in 8 shards in memory, hashed by BLAKE3", 8), _figure("  in one file", 1)]


def _figure(what: str, shards: int) -> Figure:
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="vllmd-bench-") as root:
        directory = weights.make(Path(root, "model"), shards=shards, shard_bytes=TOTAL_BYTES // shards, sparse=False)
        wanted = {file: frozenset({"blake3"}) for file in take(directory).files.values()}
        samples = []
        for _ in range(ROUNDS):
            began = time.monotonic()
            hash_files(directory, wanted, _nothing)
            samples.append(TOTAL_BYTES / 1e9 / (time.monotonic() - began))
    return Figure(what, samples, "GB/s", bar=BAR_GB_S, at_least=True)


def _nothing(_done: int, _total: int) -> None:
    pass
