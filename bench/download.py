"""Fetching a model from a store in memory to memory, beside what one would fetch it with otherwise; over HTTP and over TLS.

    python -m bench.download [--rounds N] [--bytes N]      all ways, one after the other, in turns

Needs twice the model's size of memory. The ways take turns, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import measured, peers, weights
from bench.measured import Cost
from bench.peers import PREFIX, Way
from bench.place import BenchError
from bench.static_s3 import BUCKET, Server, serving
from bench.table import Figure, render

SHARDS = 8
BYTES = 3 << 30
QUICK_BYTES = 512 << 20
ROUNDS = 3
MEMORY = Path("/dev/shm")
SIZES, SUMS = "vllmd, sizes only", "vllmd, both sums"
Costs = dict[str, list[Cost]]


def run(rounds: int = ROUNDS, size: int = BYTES) -> list[Figure]:
    ready = peers.prepared()
    if shutil.disk_usage(MEMORY).free < 2.3 * size:
        raise BenchError(f"{MEMORY} has too little room for twice {size >> 20} MiB")
    root = Path(tempfile.mkdtemp(prefix="vllmd-bench-", dir=MEMORY))
    try:
        weights.make(root / "store" / BUCKET / PREFIX, shards=SHARDS, shard_bytes=size // SHARDS, sparse=False)
        figures: list[Figure] = []
        with serving(ready.nginx, root / "store", root / "nginx") as server:
            for is_tls in (False, True):
                ways = [way for way in (*_ours(), *ready.ways) if not (is_tls and way.is_plain_only)]
                costs = _measure(ways, server, root, rounds, is_tls=is_tls)
                figures += _figures(ways, costs, size, is_tls=is_tls)
        return figures
    finally:
        shutil.rmtree(root)


def _ours() -> Iterator[Way]:
    for name, mode in ((SIZES, "sizes"), (SUMS, "sums")):
        yield Way(name, (sys.executable, "-m", "bench.fetcher", "{url}", BUCKET, PREFIX, "{to}", mode))


def _measure(ways: Sequence[Way], server: Server, root: Path, rounds: int, *, is_tls: bool) -> Costs:
    """In turns. A way that fails is left out from then on."""
    costs: Costs = {way.name: [] for way in ways}
    failed: set[str] = set()
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            if way.name not in failed:
                try:
                    costs[way.name].append(_one(way, server, root, is_tls=is_tls))
                except BenchError as error:
                    failed.add(way.name)
                    print(f"download: {way.name}: {error}", file=sys.stderr)
    return costs


def _one(way: Way, server: Server, root: Path, *, is_tls: bool) -> Cost:
    target = root / "target"
    target.mkdir()
    words = {"url": server.tls_url if is_tls else server.url, "to": str(target), "ca": str(server.ca)}
    argv = [_filled(word, words) for word in way.argv]
    try:
        environ = peers.environ(server.ca, root) | {"PYTHONPATH": str(Path(__file__).parents[1])}
        found = measured.cost(argv, environ, root)
        _check(root / "store" / BUCKET / PREFIX, target)
        return found
    finally:
        shutil.rmtree(target)


def _filled(word: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def _check(source: Path, target: Path) -> None:
    """A way that is fast because it does not fetch all is none."""
    wanted = sorted((path.name, path.stat().st_size) for path in source.iterdir())
    names = {name for name, _ in wanted}
    there = sorted((path.name, path.stat().st_size) for path in target.rglob("*") if path.is_file() and path.name in names)
    if there != wanted:
        raise BenchError(f"it did not bring all files: {len(there)} of {len(wanted)}, {sum(size for _, size in there)} bytes")


def _figures(ways: Sequence[Way], costs: Costs, size: int, *, is_tls: bool) -> list[Figure]:
    over = "TLS" if is_tls else "HTTP"
    rows = []
    for way in ways:
        runs = costs[way.name]
        cpu, memory = _gigabyte(runs, size), [run.memory_mib for run in runs]
        note = f"{statistics.median(cpu):.2f} s CPU per GB, {max(memory):.0f} MiB" if runs else ""
        rows.append(Figure(f"{over}: {way.name}", _speeds(runs, size), "MB/s", against=note, missing="failed"))
    rivals = [way.name for way in ways if way.is_rival and way.name not in (SIZES, SUMS) and costs[way.name]]
    if rivals and costs[SIZES] and costs[SUMS]:
        rows += _judged(over, costs, min(rivals, key=lambda name: statistics.median(run.seconds for run in costs[name])))
    return rows


def _judged(over: str, costs: Costs, fastest: str) -> list[Figure]:
    """Ratios round by round: both of a pair ran within the same minute."""
    ours, rival = costs[SIZES], costs[fastest]
    need = 1.0 if over == "TLS" else 1.15
    rows = [Figure(f"{over}: speed, sizes only, to the fastest peer's", _ratios(ours, rival), "x", need, at_least=True, against=fastest)]
    alone = [other.seconds / _moving(one) for one, other in zip(ours, rival, strict=False)]
    rows.append(Figure(f"{over}:   the same without our start and listing", alone, "x", against=f"{fastest}, all of it"))
    if costs.get("aws"):
        rows.append(Figure(f"{over}: speed, sizes only, to aws's", _ratios(ours, costs["aws"]), "x", 3.0 if over == "HTTP" else None, at_least=True))
    cpu = [one.cpu_s / other.cpu_s for one, other in zip(ours, rival, strict=False)]
    rows.append(Figure(f"{over}: CPU per GB, sizes only, to the fastest peer's", cpu, "x", 0.7 if over == "HTTP" else None, against=fastest))
    rows.append(Figure(f"{over}: speed with both sums to our own without", _ratios(costs[SUMS], ours), "x", 0.75, at_least=True))
    memory = [run.memory_mib for run in (*ours, *costs[SUMS])]
    return [*rows, Figure(f"{over}: memory of the fetching process", memory, "MiB", 150.0)]


def _moving(run: Cost) -> float:
    """Seconds from the first connection for bytes to the last file."""
    return float(run.words.rpartition("moved in ")[2])


def _ratios(ours: Sequence[Cost], others: Sequence[Cost]) -> list[float]:
    return [other.seconds / one.seconds for one, other in zip(ours, others, strict=False)]


def _speeds(runs: Sequence[Cost], size: int) -> list[float]:
    return [size / 1e6 / run.seconds for run in runs]


def _gigabyte(runs: Sequence[Cost], size: int) -> list[float]:
    return [run.cpu_s / (size / 1e9) for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.download", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--bytes", type=int, default=BYTES)
    given = parser.parse_args()
    before = os.getloadavg()
    print(render(run(given.rounds, given.bytes)))
    print(f"load average {before[0]:.2f} before, {os.getloadavg()[0]:.2f} after")


if __name__ == "__main__":
    main()
