"""`vllmd resolve` of a model that is there: the whole process, with 100 shards of 140 GB in all (sparse), published in a store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import weights
from bench.place import BenchError
from bench.table import Figure, compared
from vllmd.config.settings import Model
from vllmd.models import publish
from vllmd.models.contents import Contents, Entry
from vllmd.models.identity import label, request_from
from vllmd.models.validate import Checks, validate

BAR_S = 0.15
HEADERS_BAR_S = 0.03
SHARDS = 100
SHARD_BYTES = 1_400_000_000
TIMES = 25
ID = "bench/synthetic"


def run() -> list[Figure]:
    root = Path(tempfile.mkdtemp(prefix="vllmd-bench-"))
    try:
        directory = _published(root)
        _configure(root)
        _resolved(root)  # the first one reads everything from the disk, and is not counted
        whole = [_resolved(root) for _ in range(TIMES)]
        bare = [_took([sys.executable, "-c", ""]) for _ in range(TIMES)]
        helped = [_took([*_program(), "--root", str(root), "--help"]) for _ in range(TIMES)]
        headers = [_validated(directory) for _ in range(TIMES)]
    finally:
        shutil.rmtree(root)
    against = f"{compared('Python alone', bare)}; {compared('`vllmd --help`', helped)}; {compared('its headers', headers)}"
    size = f"{SHARDS} shards, {SHARDS * SHARD_BYTES / 1e9:.0f} GB"
    return [
        Figure(f"no-op `vllmd resolve`, {size}", whole, bar=BAR_S, against=against),
        Figure(f"headers of {SHARDS} shards of 90 tensors", headers, bar=HEADERS_BAR_S),
    ]


def _published(root: Path) -> Path:
    """As a download leaves it, by the product's own publication; only the sums are those of nothing."""
    request = request_from(Model(id=ID), root / "lib/models")
    stage = request.store / ".staging" / label(request) / "files"
    weights.make(stage, shards=SHARDS, shard_bytes=SHARD_BYTES, sparse=True)
    files = {}
    for path in sorted(stage.iterdir()):
        plausible = hashlib.sha256(path.name.encode()).hexdigest()
        files[path.name] = Entry(path.stat().st_size, plausible, plausible, plausible[:32])
    contents = Contents(request.identity, "r2", "s3://bench/synthetic", "", "2026-01-01T00:00:00Z", files)
    return publish.publish(request.store, request, stage, contents, 2, lambda _text: None)


def _configure(root: Path) -> None:
    (root / "etc").mkdir()
    (root / "etc/demo.yaml").write_text(json.dumps({"model": {"id": ID}, "gpus": "none"}))


def _program() -> list[str]:
    installed = Path(sys.prefix) / "bin/vllmd"
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "vllmd.cli"]


def _resolved(root: Path) -> float:
    return _took([*_program(), "--root", str(root), "resolve", "demo"])


def _took(argv: list[str]) -> float:
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8"}
    began = time.perf_counter()
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        raise BenchError(f"{argv} ended with {done.returncode}: {done.stderr[-500:]}")
    return took


def _validated(directory: Path) -> float:
    began = time.perf_counter()
    validate(directory, Checks())
    return time.perf_counter() - began


if __name__ == "__main__":
    for figure in run():
        print(f"{figure.what}: {statistics.median(figure.samples):.3f} s, least {min(figure.samples):.3f} s; {figure.against}")
