"""A source whose model turned bad: the child says what and where, the version before stays, and the next good one is taken."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.component.hostile import (
    BASE,
    ID,
    INDEX,
    SHARD1,
    SHARD2,
    Bucket,
    Files,
    World,
    check_refusal,
    digests,
    header_of,
    reheadered,
    run,
)
from tests.fakes.hub import FakeHub
from tests.fakes.s3_server import S3Server, item
from vllmd.models import wire

pytestmark = pytest.mark.component


def overlapping(shard: bytes) -> bytes:
    header = header_of(shard)
    first, second = [name for name in header if name != "__metadata__"][:2]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    begin = header[first]["data_offsets"][0]
    header[second]["data_offsets"] = [begin, begin + size]
    return reheadered(shard, header)


def longer_than_its_header(files: Files) -> None:
    files[SHARD2] += b"\0" * 8


def with_index(files: Files, weight_map: object) -> None:
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def pointing(target: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        weight_map = json.loads(files[INDEX])["weight_map"]
        weight_map["model.norm.weight"] = target
        with_index(files, weight_map)

    return change


def put(name: str, data: bytes) -> Callable[[Files], None]:
    return lambda files: files.update({name: data})


def huge_header(files: Files) -> None:
    """JSON of 100 MB, one byte more than any safetensors header may have."""
    files[SHARD2] = (100_000_001).to_bytes(8, "little") + b'{"__metadata__":{}' + b" " * (100_000_001 - 19) + b"}"


def wrong_sums(files: Files) -> None:
    files["sha256sums.txt"] = f"{hashlib.sha256(b'').hexdigest()}  {SHARD2}\n".encode()


CONTENTS: list[tuple[str, Callable[[Files], object], str, str]] = [
    ("missing", lambda files: files.pop(SHARD2), SHARD2, ""),
    ("empty", put(SHARD2, b""), SHARD2, ""),
    ("truncated", put(SHARD2, BASE[SHARD2][:-100]), SHARD2, "100 bytes are missing"),
    ("truncated-in-header", put(SHARD2, BASE[SHARD2][:100]), SHARD2, "truncated"),
    ("longer", longer_than_its_header, SHARD2, "8 bytes follow its last tensor"),
    ("header-2^63", put(SHARD2, (1 << 63).to_bytes(8, "little") + BASE[SHARD2][8:]), SHARD2, "claims 9223372036854775808"),
    ("header-100MB", huge_header, SHARD2, "claims 100000001"),
    ("overlapping", put(SHARD1, overlapping(BASE[SHARD1])), SHARD1, "overlap"),
    ("html", put(SHARD2, b"<!DOCTYPE html><html>Sign in</html>" * 10), SHARD2, ""),
    ("lfs-pointer", put("config.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), "config.json", ""),
    ("index-parent", pointing("../../../../canary/config.json"), INDEX, "../"),
    ("index-absolute", pointing("/etc/passwd"), INDEX, "/etc/passwd"),
    ("index-control", pointing("a\x1b[2Jb\nc.safetensors"), INDEX, "\\x1b"),
    ("index-nowhere", pointing("model-00009-of-00002.safetensors"), "model-00009-of-00002.safetensors", ""),
    ("index-nonsense", put(INDEX, b"[" * 100_000), INDEX, ""),
    ("config-nonsense", put("config.json", b"\xff\xfe\0"), "config.json", ""),
    ("wrong-sha256", wrong_sums, SHARD2, hashlib.sha256(b"").hexdigest()),
    ("parent", put("../evil.safetensors", b"x"), "'../evil.safetensors'", ""),
    ("deep-parent", put("sub/../../../../evil.json", b"x"), "'sub/../../../../evil.json'", ""),
    ("absolute", put("/dev/shm/vllmd-evil", b"x"), "'/dev/shm/vllmd-evil'", ""),
    ("backslash", put("..\\evil.json", b"x"), "evil.json", ""),
    ("control", put("a\n\x1b[31mb.json", b"x"), "\\x1b", ""),
    ("case", put("Config.JSON", b"{}"), "'Config.JSON'", "'config.json'"),
    ("file-and-directory", put("config.json/x", b"{}"), "'config.json/x'", ""),
    ("long-name", put("n" * 300 + ".json", b"{}"), "nnnn", "too long"),
]


@pytest.mark.parametrize(("change", "place", "reason"), [case[1:] for case in CONTENTS], ids=[case[0] for case in CONTENTS])
def test_hub_model_that_is_wrong(served: tuple[World, FakeHub], change: Callable[[Files], object], place: str, reason: str) -> None:
    world, _ = served
    before, version = digests(world.around, world.store), world.link.resolve()
    files = world.good()
    change(files)
    world.set_content(files)
    check_refusal(world.fetch(), 65, place, reason)
    world.check_served(version, before)
    assert world.publish_good() != version


@pytest.mark.parametrize("key", ["../evil.json", "/etc/evil.json", "sub/../../../evil.json", "CONFIG.json", "a//b.json", "./c.json", "config.json/x"])
def test_s3_key_that_is_no_name_within_a_model(bucketed: tuple[World, Bucket, S3Server], key: str) -> None:
    world, bucket, _ = bucketed
    before, version = digests(world.around, world.store), world.link.resolve()
    bucket.set(world.good())
    bucket.extra = [item(f"p/Tiny/{key}")]
    check_refusal(world.fetch(), 65, "s3://models/p/Tiny/", repr(key))
    world.check_served(version, before)
    assert world.publish_good() != version


def test_index_that_names_a_shard_and_a_tensor_twice_counts_each_once(served: tuple[World, FakeHub]) -> None:
    """Every index names a shard once a tensor; of a tensor that stands there twice the last entry holds, for engines too."""
    world, _ = served
    files = world.good()
    weight_map = json.loads(files[INDEX])["weight_map"]
    assert list(weight_map.values()).count(SHARD1) > 1
    doubled = f'"weight_map": {{"model.norm.weight": "{SHARD1}",'
    files[INDEX] = files[INDEX].decode().replace('"weight_map": {', doubled).encode()
    world.set_content(files)
    outcome = world.fetch()
    [resolved] = [event for event in outcome.events if isinstance(event, wire.Resolved)]
    assert (outcome.status, outcome.stderr) == (0, b"")
    assert resolved.model.bytes == sum(map(len, files.values()))


def test_previous_model_is_what_a_start_gets_with_a_warning(served: tuple[World, FakeHub]) -> None:
    """The hub is asked first; what it has is no model, so the store's own is served, and both are said."""
    world, _ = served
    version = world.link.resolve()
    files = world.good()
    files.pop(SHARD2)
    world.set_content(files)
    outcome = run(replace(world.asked, sources=("hf-hub", "local")), world.settings, world.variables)
    assert (outcome.status, outcome.stderr) == (0, b"")
    assert outcome.said(SHARD2)
    assert outcome.said(f"Resolved: {ID} (via local)")
    assert world.link.resolve() == version
    assert world.publish_good() != version


@pytest.mark.parametrize("target", ["../../canary/config.json", "/etc/hostname"])
def test_local_model_with_a_link_out_of_its_tree(served: tuple[World, FakeHub], target: str) -> None:
    world, _ = served
    before, version = digests(world.around, world.store), world.link.resolve()
    directory = world.store / "linking"
    directory.mkdir(exist_ok=True)
    for name, data in BASE.items():
        (directory / name).write_bytes(data)
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to(target)
    asked = replace(world.asked, path=str(directory), sources=("local",))
    check_refusal(run(asked, world.settings, world.variables), 65, f"{directory}/config.json", "leaves the model's directory")
    world.check_served(version, before)
    shutil.rmtree(directory)
