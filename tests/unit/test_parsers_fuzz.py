"""Every parser of untrusted bytes: returns, or raises its documented errors, soon; and what is valid comes back as it was."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools import fuzz
from vllmd.config import envfile
from vllmd.errors import ModelInvalid
from vllmd.models import contents, safetensors, sums, wire
from vllmd.models.progress import Progress

pytestmark = pytest.mark.unit

NAMES = ("env", "safetensors", "gguf", "index", "contents", "manifest", "sums", "events", "journal", "ref")
QUICK = settings(max_examples=150, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SUM = st.text("0123456789abcdef", min_size=64, max_size=64)
FILE = st.text("abc-._ 1", min_size=1, max_size=9).filter(lambda name: name.strip(". ") == name)


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, fuzz.Target]]:
    with fuzz.targets() as known:
        yield known


def accepts(target: fuzz.Target, data: bytes) -> bool:
    try:
        target.parse(data)
    except target.expected:
        return False
    return True


def test_names(targets: dict[str, fuzz.Target]) -> None:
    assert set(NAMES) == set(targets)


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes(targets: dict[str, fuzz.Target], name: str) -> None:
    @QUICK
    @given(st.binary(max_size=300))
    def holds(data: bytes) -> None:
        accepts(targets[name], data)

    holds()


@pytest.mark.parametrize("name", ["index", "contents", "manifest", "events", "safetensors"])
def test_any_json_in_place_of_any_part(targets: dict[str, fuzz.Target], name: str) -> None:
    seed = targets[name].seeds[0]
    document = json.loads(_json_of(seed))

    @QUICK
    @given(st.randoms(use_true_random=False), JSON)
    def holds(chance: random.Random, value: Any) -> None:
        changed = json.dumps(_with(document, chance, value)).encode()
        accepts(targets[name], struct.pack("<Q", len(changed)) + changed + bytes(12 + len(changed) % 2) if name == "safetensors" else changed)

    holds()


def _json_of(seed: bytes) -> bytes:
    return seed[seed.index(b"{") : seed.rindex(b"}") + 1]


def _with(document: Any, chance: random.Random, value: Any) -> Any:
    """The document, with one place of it replaced."""
    if not isinstance(document, dict) or not document or chance.random() < 0.2:
        return value
    key = chance.choice(sorted(document))
    return {**document, key: _with(document[key], chance, value)}


@pytest.mark.parametrize("name", NAMES)
def test_mutated_inputs(targets: dict[str, fuzz.Target], name: str) -> None:
    assert fuzz.fuzz(targets[name], 1000, seed=7).faults == []


@pytest.mark.soak
def test_many_mutated_inputs() -> None:
    found = fuzz.run(200_000, seed=11)
    assert {name: one.faults for name, one in found.items() if one.faults} == {}


def test_a_fault_is_found() -> None:
    """The fuzzer would see an error that nobody documented, and what takes long."""

    def parse(data: bytes) -> None:
        if b"[" in data:
            raise IndexError

    assert fuzz.fuzz(fuzz.Target(parse, (ValueError,), (b"{}",)), 1000, seed=1).faults


@QUICK
@given(st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)))
def test_env_files_come_back(variables: dict[str, str]) -> None:
    assert envfile.parse(envfile.render(variables), "x") == variables


@QUICK
@given(st.dictionaries(FILE, SUM, min_size=1))
def test_sums_come_back(found: dict[str, str]) -> None:
    text = "".join(f"{one}  {name}\n" for name, one in found.items())
    assert sums.parse(text, Path("x")) == found


@QUICK
@given(TEXT, st.dictionaries(FILE, st.builds(contents.Entry, st.integers(0, 1 << 50), SUM, SUM, TEXT)))
def test_manifests_come_back(tmp_path_factory: pytest.TempPathFactory, text: str, files: dict[str, contents.Entry]) -> None:
    written = contents.Contents(text, "r2", text, "", text, files)
    folder = tmp_path_factory.getbasetemp()
    contents.write(folder, written)
    assert contents.read(folder) == written
    assert contents.read(folder).sha256 == written.sha256


@QUICK
@given(TEXT, st.integers(0, 1 << 60))
def test_events_come_back(text: str, number: int) -> None:
    for event in (Progress("fetch", text, number, number, text), wire.Verified(text)):
        assert wire.decode_event(wire.encode_event(event)) == event


@QUICK
@given(st.dictionaries(TEXT.filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 3), max_size=3)))
def test_headers_are_accepted_and_any_other_size_is_not(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]) -> None:
    tensors, at = {}, 0
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        tensors[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(tensors).encode()
    folder = tmp_path_factory.getbasetemp()
    whole = struct.pack("<Q", len(text)) + text + bytes(at)
    (folder / "x").write_bytes(whole)
    safetensors.check(folder, "x")
    for wrong in (whole + b"x", whole[:-1]):
        (folder / "x").write_bytes(wrong)
        with pytest.raises(ModelInvalid):
            safetensors.check(folder, "x")
