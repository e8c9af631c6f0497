"""Start to READY of an engine that imports and then reads its weights: with them verified meanwhile, and without; cold and warm.

The part of the time to read them cold that is left with the pass is what was promised; a start with warm weights must not pay.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import weights
from bench.place import STUB, BenchError, Place, install_stub
from bench.table import Figure, compared
from vllmd.engines import record

SHARDS, SHARD_BYTES = 8, 400_000_000
IMPORT_S = 12.0
"""Shorter than any engine's."""
ROUNDS = 3
BAR_PERCENT = 20.0
WARM_BAR_S = 0.3
READY_S = 120.0
LOADER = Path(__file__).with_name("loader.py")


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the daemon's exec to READY=1, and of these those in which the engine read its weights."""

    ready_s: float
    read_s: float


def run() -> list[Figure]:
    cold: dict[str, list[Start]] = {"off": [], "auto": []}
    warm: dict[str, list[Start]] = {"off": [], "auto": []}
    with tempfile.TemporaryDirectory(prefix="vllmd-bench-") as root:
        if shutil.disk_usage(root).free < 3 * SHARDS * SHARD_BYTES:
            raise BenchError(f"{root} has too little space")
        model = weights.make(Path(root, "model"), shards=SHARDS, shard_bytes=SHARD_BYTES, sparse=False)
        os.sync()
        with Place(engines=_engines(Path(root, "engines")), env={"BENCH_IMPORT_S": str(IMPORT_S), "BENCH_STUB": str(STUB)}) as place:
            _start(place, model, "auto")  # remembers what the bytes must be
            for _ in range(ROUNDS):
                for warm_up in ("off", "auto"):
                    _forget(model)
                    cold[warm_up].append(_start(place, model, warm_up))
                    warm[warm_up].append(_start(place, model, warm_up))
    return _figures(cold, warm)


def _figures(cold: dict[str, list[Start]], warm: dict[str, list[Start]]) -> list[Figure]:
    left, extra = [], []
    for without, with_pass in zip(cold["off"], cold["auto"], strict=True):
        left.append(100 * (1 - (without.ready_s - with_pass.ready_s) / without.read_s))
    for without, with_pass in zip(warm["off"], warm["auto"], strict=True):
        extra.append(with_pass.ready_s - without.ready_s)
    read = compared("without: read in", [start.read_s for start in cold["off"]])
    reread = compared("with: read in", [start.read_s for start in cold["auto"]])
    ready = compared("without", [start.ready_s for start in cold["off"]])
    return [
        Figure("weights cold: part of the time to read them that is left", left, "%", BAR_PERCENT, against=f"{read}; {reread}"),
        Figure("  start to READY=1 with every byte verified", [start.ready_s for start in cold["auto"]], against=ready),
        Figure("weights warm: what the verification adds to a start", extra, bar=WARM_BAR_S, against=compared("without", [start.ready_s for start in warm["off"]])),
    ]


def _start(place: Place, model: Path, warm_up: str) -> Start:
    place.write_config({"model": {"path": str(model), "warm_up": warm_up}, "start": {"proof": "health"}})
    began = place.start()
    ready = place.ready_at(READY_S)
    opened, loaded = place.stamp("opened"), place.stamp("loaded")
    place.stop()
    return Start(ready - began, loaded - opened)


def _forget(model: Path) -> None:
    """Out of the page cache."""
    for path in model.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _engines(directory: Path) -> Path:
    install_stub(directory)
    program = directory / record.CURRENT / "bin/vllm"
    program.write_text(f"#!{sys.executable} -IS\n{LOADER.read_text()}")
    return directory
