"""Feeds mutated inputs to everything that parses what others wrote, and says which of them came out as anything but the
documented errors, or took long.

    python -m tools.fuzz [--runs N] [--seed S] [--only NAME]... [--keep DIRECTORY]

Without other tools: seeds of each format, mutated in bytes and in words of the format. Deterministic for a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vllmd.config import envfile
from vllmd.errors import ConfigError, ModelInvalid
from vllmd.models import contents, gguf, inventory, manifest, safetensors, sums, validate, wire
from vllmd.models.progress import Progress
from vllmd.models.sources import hub
from vllmd.models.transfer import journal

SLOW_S = 2.0
"""Of CPU time, for one input; the inputs are small."""
MAX_BYTES = 4096
PARSED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
WORDS = (
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 30, b"9" * 5000, b"\\u0000", b"\\ud800",
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"../", b"/", b"./", b"'", b"$(", b"`", b"\\", b"\n", b"\r", b"=", b"[" * 2000, b'{"a":' * 400,
    struct.pack("<Q", 2**63), struct.pack("<Q", 2**64 - 1), struct.pack("<I", 9), struct.pack("<Q", 1), bytes(8),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """`parse` takes the input; what it may raise is in `expected`."""

    parse: Callable[[bytes], object]
    expected: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]


@dataclass
class Found:
    runs: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    faults: list[tuple[str, bytes]] = field(default_factory=list)


def mutated(seeds: tuple[bytes, ...], chance: random.Random) -> bytes:
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[at % len(data)] = chance.randrange(256)
            case 2:
                data[at:at] = chance.choice(WORDS)
            case 3:
                del data[at : at + chance.randrange(1, 16)]
            case 4:
                other = chance.choice(seeds)
                begin = chance.randrange(len(other) + 1)
                data[at:at] = other[begin : begin + chance.randrange(1, 64)]
            case 5:
                word = chance.choice(WORDS)
                data[at : at + len(word)] = word
            case _:
                del data[at:]
    return bytes(data[:MAX_BYTES])


def fuzz(target: Target, runs: int, seed: int) -> Found:
    chance, found = random.Random(seed), Found()
    for _ in range(runs):
        data = mutated(target.seeds, chance)
        started = time.process_time()
        try:
            target.parse(data)
        except target.expected:
            found.refused += 1
        except Exception as error:
            found.faults.append((f"{type(error).__name__}: {error}", data))
        took = time.process_time() - started
        if took > SLOW_S:
            found.faults.append((f"took {took:.1f} s", data))
        found.runs += 1
        found.slowest_s = max(found.slowest_s, took)
    return found


@contextmanager
def targets() -> Iterator[dict[str, Target]]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="vllmd-fuzz-", dir=memory if memory.is_dir() else None) as name:
        yield _targets(Path(name))


def _targets(folder: Path) -> dict[str, Target]:
    def in_file(check: Callable[[Path, str], object]) -> Callable[[bytes], object]:
        def parse(data: bytes) -> object:
            (folder / "x").write_bytes(data)
            return check(folder, "x")

        return parse

    shards = {name: inventory.ModelFile(name, 1, 0, 0, 0) for name in ("a.safetensors", "b.safetensors")}
    model = inventory.Inventory(folder, shards)
    (folder / "models--a--b/refs").mkdir(parents=True)

    def ref(data: bytes) -> None:
        (folder / "models--a--b/refs/main").write_bytes(data)
        found = hub._ref(folder / "models--a--b", "main")
        assert not found or hub.COMMIT.fullmatch(found), found
        hub._ref(folder / "models--a--b", data[:50].decode("utf-8", "replace").replace("\0", ""))

    def env(data: bytes) -> None:
        found = envfile.parse(data.decode("utf-8", "surrogateescape"), "x")
        assert envfile.parse(envfile.render(found), "x") == found

    def lined(data: bytes) -> object:
        """Also with sums that are right, or nothing behind them would be reached."""
        journal.replayed(data, "b")
        texts = (line[9:] for line in data.split(b"\n"))
        return journal.replayed(b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts), "b")

    def shard(data: bytes) -> object:
        """Half of them with the length that the header really has."""
        if len(data) % 2:
            end = data.rfind(b"}") + 1
            data = struct.pack("<Q", max(0, end - 8)) + data[8:]
        return in_file(safetensors.check)(data)

    return {
        "env": Target(env, (ConfigError,), _ENV),
        "safetensors": Target(shard, (ModelInvalid,), _SAFETENSORS),
        "gguf": Target(in_file(gguf.check), (ModelInvalid,), _gguf_seeds()),
        "index": Target(in_file(lambda directory, name: validate._check_index(model, directory / name)), (ModelInvalid,), _INDEX),
        "contents": Target(contents.parse, PARSED, _CONTENTS),
        "manifest": Target(lambda data: manifest._parse(json.loads(data)), PARSED, _MANIFEST),
        "sums": Target(lambda data: sums.parse(data.decode("utf-8", "replace"), folder), (ModelInvalid,), _SUMS),
        "events": Target(wire.decode_event, (), _EVENTS),
        "journal": Target(lined, (), _journal_seeds()),
        "ref": Target(ref, (), (b"0123456789abcdef0123456789abcdef01234567\n", b"refs/pr/1", b"v1.0")),
    }


def _shard(tensors: object, data: bytes) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _gguf_seeds() -> tuple[bytes, ...]:
    keys = _text(b"general.alignment") + struct.pack("<II", 4, 32) + _text(b"t") + struct.pack("<IIQ", 9, 8, 2) + _text(b"a") + _text(b"b")
    nested = _text(b"n") + struct.pack("<IIQIQ", 9, 9, 1, 4, 2) + bytes(8)
    tensor = _text(b"t") + struct.pack("<IQQIQ", 2, 32, 2, 2, 0)
    whole = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + keys + nested + tensor
    old = b"GGUF" + struct.pack("<III", 1, 0, 1) + struct.pack("<I", 1) + b"k" + struct.pack("<IB", 0, 1) + bytes(16)
    return (whole + bytes(-len(whole) % 32) + bytes(36), b"GGUF" + struct.pack(">IQQ", 3, 0, 0), old)


def _journal_seeds() -> tuple[bytes, ...]:
    lines = (("boot", "b"), ("file", "x", "m", 9), ("part", "x", 0, 5), ("sum", "x", 5, "0" * 64), ("done", "x", 9, 1, 2, "0" * 64, "1" * 64))
    wrong: tuple[tuple[object, ...], ...] = (("boot", 1), ("file", "../x", 1, -1), ("part", "x", 5, 0), ("part", [], 0, 1), ("sum", "x", "y", 1), ("done", "x"), ())
    return tuple(b"".join(journal._line(*line) for line in some) for some in (lines, (*lines[:3], *wrong), lines[:2]))


_ENV = (b"A=1\nexport B='x y'\n# c\nC=\"a\\nb\\\"\" # d\n", b"_VLLM_RESOLVED_MODEL='/m'\nHF_HUB_OFFLINE=1\n", b"")
_TENSOR = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}
_SAFETENSORS = (_shard({"__metadata__": {"format": "pt"}, "a": _TENSOR}, bytes(12)), _shard({"a": _TENSOR, "b": {"dtype": "F4", "shape": [4], "data_offsets": [12, 14]}}, bytes(14)))
_INDEX = (json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}).encode(), b'{"weight_map": {"a": "../a"}}')
_SUM = "0" * 64
_CONTENTS = (json.dumps({"schema": 1, "identity": "a", "source": "r2", "origin": "o", "revision": "", "created_at": "x", "files": {"a": {"size": 1, "sha256": _SUM, "blake3": _SUM, "pin": ""}}}).encode(),)
_MANIFEST = (json.dumps({"schema": 1, "identity": "a", "directory": "/m", "source": "s", "revision": "", "files": {"a": {"size": 1, "mtime_ns": 1, "ctime_ns": 1, "inode": 1, "sha256": _SUM, "blake3": _SUM}}}).encode(),)
_SUMS = (f"{_SUM}  a b.bin\n{_SUM} *sub/c\n".encode(), b"\xef\xbb\xbf\n")
_EVENTS = (
    wire.encode_event(Progress("fetch", "r2", 1, 2, "t")),
    wire.encode_event(wire.Verified(_SUM)),
    wire.encode_event(wire.Failed(ModelInvalid("model_corrupt", "what", "hint"))),
    json.dumps({"event": "resolved", "identity": "a", "directory": "/m", "via": "r2", "revision": "", "bytes": 1, "manifest_sha256": ""}).encode(),
)


def run(runs: int, seed: int, only: list[str] | None = None, keep: Path | None = None) -> dict[str, Found]:
    """`runs` inputs in all, shared out evenly."""
    with targets() as known:
        names = only or list(known)
        found = {name: fuzz(known[name], -(-runs // len(names)), seed) for name in names}
    for name, one in found.items():
        for number, (_, data) in enumerate(one.faults[:20] if keep else ()):
            assert keep is not None
            (keep / f"{name}-{number}").write_bytes(data)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="where inputs that were handled wrongly are put")
    options = parser.parse_args()
    found = run(options.runs, options.seed, options.only, options.keep)
    for name, one in found.items():
        print(f"{name:<12} {one.runs:>9} inputs, {one.refused:>9} refused, slowest {1000 * one.slowest_s:7.1f} ms, {len(one.faults)} faults")
        for what, data in one.faults[:3]:
            print(f"    {what[:200]}: {data[:200]!r}")
    faults = sum(len(one.faults) for one in found.values())
    print(f"{sum(one.runs for one in found.values())} inputs, seed {options.seed}: {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
