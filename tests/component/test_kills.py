"""SIGKILL at random moments, of the fetching child and of the process that runs it: the link always leads to a whole version,
the next resolve goes on where the killed one was, and what was verified is not fetched again."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests import publishing
from tests.component.hostile import BASE, FETCH, Bucket, Files, World, s3_world
from tests.fakes.s3_server import Asked, Reply, S3Server
from vllmd.models import wire
from vllmd.models.identity import label
from vllmd.models.resolve import resolve

pytestmark = pytest.mark.component

KILLS = int(os.environ.get("VLLMD_SOAK_KILLS", "200"))
PAUSE_S = 0.03
PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
child.stdin.write(sys.stdin.buffer.readline())
child.stdin.flush()
sys.exit(child.wait())
"""
WAYS = {"child": FETCH, "parent": [sys.executable, "-c", PARENT, *FETCH], "command": [sys.executable, "-c", "import sys, vllmd.cli\nsys.exit(vllmd.cli.resolve_main())"]}
SHARDS = 8
SHARD_BYTES = 400_000
SMALL_BYTES = sum(map(len, BASE.values()))
CONNECTIONS = 2


@pytest.fixture(scope="module")
def bucketed() -> Iterator[tuple[World, Bucket, S3Server]]:
    with s3_world(fetch_connections=CONNECTIONS, fetch_stall_s=20) as (made, bucket, server):
        made.publish_good()
        made.variables |= {
            "VLLM_MODEL": "Tiny",
            "VLLM_MODEL_ENV_FILE": str(made.around / "home/model.env"),
            "VLLM_MODEL_ORG": "acme",
            "VLLM_MODELS_DIR": str(made.store),
            "VLLM_MODEL_SOURCES": "r2",
            "VLLMD_FETCH_CONNECTIONS": str(CONNECTIONS),
            "R2_BUCKET": "models",
            "R2_MODELS_PREFIX": "p",
            "R2_ENDPOINT_URL": server.url,
        }
        yield made, bucket, server


def version(number: int) -> Files:
    """No long file is like the one of the version before: each is fetched."""
    long = {f"extra/{shard}.txt": random.Random(number * SHARDS + shard).randbytes(SHARD_BYTES) for shard in range(SHARDS)}
    return BASE | long | {"notes.txt": b"%d" % number}


def offer(bucket: Bucket, files: Files, pause_s: float) -> None:
    """Each piece takes a while, so that kills meet the download too, and not only the imports."""

    def script(asked: Asked) -> Reply | None:
        name = asked.path.removeprefix("/models/p/Tiny/")
        if "list-type=2" in asked.target or not name.startswith("extra/"):
            return None
        reply = bucket.piece(asked, name, files[name])
        time.sleep(pause_s)
        return reply

    bucket.set(files)
    bucket.script = script
    bucket.sent_bytes.clear()


def killed(world: World, way: str, after_s: float) -> bool:
    """Whether it was still at work then. Below a parent only that is killed: the child ends since its stdin does. Returns when
    all are gone: each has the other end of the pipes that are read here."""
    with subprocess.Popen(WAYS[way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=world.variables) as process:
        assert process.stdin
        process.stdin.write(wire.encode_request(world.asked, world.settings))
        process.stdin.flush()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after_s)
        process.kill()
        out, err = process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGKILL), (out, err)
    assert b"Traceback" not in err, err
    return process.returncode != 0


def staged(world: World) -> set[str]:
    """Names of files that the killed one had fetched and verified."""
    directory = world.store / ".staging" / label(world.asked) / "files"
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def duration(world: World, bucket: Bucket, way: str) -> float:
    """Of a run that nobody kills, in seconds."""
    offer(bucket, version(-random.Random(way).randrange(10**6)), PAUSE_S)
    began = time.monotonic()
    assert not killed(world, way, 60)
    return time.monotonic() - began


@pytest.mark.parametrize("kills", [10, pytest.param(KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_killed_at_random_moments(bucketed: tuple[World, Bucket, S3Server], kills: int) -> None:
    world, bucket, _ = bucketed
    moments = random.Random(kills)
    lengths = {way: duration(world, bucket, way) for way in WAYS}
    counts = dict.fromkeys(("rounds", "killed", "old", "new", "resumed", "kept files", "kept bytes", "fetched again"), 0)
    ways = itertools.cycle(WAYS)
    while counts["killed"] < kills:
        counts["rounds"] += 1
        assert counts["rounds"] < 3 * kills, counts
        way, before = next(ways), world.link.resolve()
        files = version(counts["rounds"])
        offer(bucket, files, PAUSE_S)
        counts["killed"] += killed(world, way, moments.uniform(0.2, 1.1) * lengths[way])
        assert publishing.wrong(world.store, world.asked) == []
        reached = world.link.resolve()
        counts["old" if reached == before else "new"] += 1
        done, sent = staged(world) & files.keys(), sum(bucket.sent_bytes.values())  # the publisher adds a file of its own
        offer(bucket, files, 0)
        model = resolve(world.asked, world.settings, world.variables, lambda progress: None)
        assert world.link.resolve() == model.directory
        assert publishing.wrong(world.store, world.asked) == []
        assert {name: (model.directory / name).read_bytes() for name in files} == files
        left = publishing.half(world.store)
        if model.directory == reached:  # killed after it had published: the next publication clears away what it removed then
            left = [path for path in left if "/.trash/" not in path]
        assert left == [], (counts, way)
        again = [name for name in done if bucket.sent_bytes.get(name)]
        assert not again, (counts, way)
        counts["resumed"] += bool(done)
        counts["kept files"] += len(done)
        counts["kept bytes"] += sum(len(files[name]) for name in done)
        twice = max(0, sent + sum(bucket.sent_bytes.values()) - sum(map(len, files.values())))
        assert twice <= CONNECTIONS * SHARD_BYTES + SMALL_BYTES, (counts, way)
        counts["fetched again"] += twice
    print(counts, lengths)
