"""Models that are made to cost time or memory, or to be read otherwise by the engine than by us: refused, and soon."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import tiny_models
from vllmd.errors import ModelInvalid
from vllmd.models import inventory
from vllmd.models.validate import Checks, validate

pytestmark = pytest.mark.unit
SHARD1, SHARD2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@contextmanager
def soon(seconds: float) -> Iterator[None]:
    """Bounds far above what is needed: the machine may be busy, and what they catch takes minutes."""
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


def refusal(directory: Path) -> ModelInvalid:
    with pytest.raises(ModelInvalid) as caught:
        validate(directory, Checks())
    return caught.value


@pytest.mark.parametrize("name", [f"./{SHARD1}", f".//{SHARD1}", f"a/./{SHARD1}", f"{SHARD1}/", f"{SHARD1}/."])
def test_shard_that_the_index_spells_otherwise(model: Path, name: str) -> None:
    """An engine compares the names as texts, and would load the model without that shard."""
    tiny_models.write_index(model, {"a": name, "b": SHARD1, "c": SHARD2})
    error = refusal(model)
    assert error.code == "model_corrupt"
    assert "not how that file is called" in error.what


def test_shard_in_another_case_is_missing(model: Path) -> None:
    tiny_models.write_index(model, {"a": SHARD1.upper(), "b": SHARD2})
    assert SHARD1.upper() in refusal(model).what


def test_index_needs_no_metadata_and_may_name_what_two_shards_have(model: Path) -> None:
    (model / SHARD1).write_bytes((model / SHARD2).read_bytes())
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": SHARD1, "b": SHARD2}}))
    validate(model, Checks())


def test_index_of_half_a_million_entries(model: Path) -> None:
    shards = (SHARD1, SHARD2)
    tiny_models.write_index(model, {str(number): shards[number % 2] for number in range(500_000)})
    with soon(20):
        validate(model, Checks())


def test_index_of_too_many_files(model: Path) -> None:
    tiny_models.write_index(model, {str(number): str(number) for number in range(200_000)})
    with soon(10):
        assert "200000 files" in refusal(model).what


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "modules.json"])
@pytest.mark.parametrize("bomb", ["[" * 500_000, '{"a":' * 500_000, "9" * 500_000, '{"weight_map": ' + "[" * 500_000])
def test_json_that_is_deep_or_long(model: Path, name: str, bomb: str) -> None:
    (model / name).write_text(bomb)
    with soon(10):
        assert f"{model}/{name}" in refusal(model).what


def test_config_that_says_a_thing_twice_is_left_to_the_engine(model: Path) -> None:
    """Some published ones do; both of us take the last."""
    text = (model / "config.json").read_text().rstrip().removesuffix("}")
    (model / "config.json").write_text(text + ', "vocab_size": 7, "vocab_size": 8}')
    validate(model, Checks())


def shard(text: bytes, data: int) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(data)


ENTRY = b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":%s,"a":%s}' % (ENTRY, ENTRY),
        b'{"a":%s,"\\u0061":%s}' % (ENTRY, ENTRY.replace(b"data_o", b"dat\\u0061_o")),
        b'{"a":{"dtype":"U8","shape":[5],"shape":[4],"data_offsets":[0,4]},"b\\u0062":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}',
        b'{"a":{"dtype":"F32","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        b'{"a":{},"a":%s}' % ENTRY,
        b'{"a":7,"a":%s}' % ENTRY,
        b'{"__metadata__":{"x":"1","x":"2"},"a":%s}' % ENTRY,
        b'{"__metadata__":{},"__metadata__":{"x":"2"},"a":%s}' % ENTRY,
        b'{"a":%s,"__metadata__":{"x":"1"},"__metadata__":{}}' % ENTRY,
    ],
)
def test_tensor_that_stands_twice_in_a_header(model: Path, text: bytes) -> None:
    (model / SHARD1).write_bytes(shard(text, 4))
    assert "stands in it twice" in refusal(model).what


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (b'"U8"', b"8"),
        (b'"U8"', b'["U8"]'),
        (b"[4]", b'{"4":4}'),
        (b"[4]", b'"4"'),
        (b"[4]", b"[4,true]"),
        (b"[4]", b"[4.0]"),
        (b"[4]", b"[-4,-1]"),
        (b"[4]", b"[0,9223372036854775808]"),
        (b"[0,4]", b"[false,4]"),
        (b"[0,4]", b"[0.0,4]"),
        (b"[0,4]", b"[0,4.0]"),
        (b"[0,4]", b"[-4,0]"),
        (b"[0,4]", b"[4,0]"),
        (b"[0,4]", b"[0,4,4]"),
        (b"[0,4]", b"[0,9223372036854775808]"),
        (b"[0,4]", b'{"0":0,"4":4}'),
        (b"[0,4]", b'"04"'),
        (b',"data_offsets":[0,4]', b""),
    ],
)
def test_tensor_whose_entry_is_wrong_in_one_thing(model: Path, right: bytes, wrong: bytes) -> None:
    for dtype in (b'"U8"', b'"NEWER"'):  # of a type that is not known nothing but the size is left to the engine
        entry = ENTRY.replace(right, wrong).replace(b'"U8"', dtype)
        (model / SHARD1).write_bytes(shard(b'{"a":%s}' % entry, 4))
        assert "wrong about tensor 'a'" in refusal(model).what


def test_names_with_escapes_are_no_fault(model: Path) -> None:
    (model / SHARD1).write_bytes(shard(b'{"a\\u0061":%s,"__metadata__":{"x":"\\"data_offsets\\""}}' % ENTRY, 4))
    validate(model, Checks())


def test_colons_in_names_and_more_members_than_we_know_are_no_fault(model: Path) -> None:
    text = b'{"a:0":%s,"__metadata__":{"x:y":"z:z"}}' % ENTRY.replace(b"}", b',"layout":"dense"}')
    (model / SHARD1).write_bytes(shard(text, 4))
    validate(model, Checks())


@pytest.mark.parametrize("metadata", [b"3", b"null", b'["x"]', b'{"x":1}', b'{"x":{"y":"z"}}'])
def test_metadata_that_is_no_map_of_texts(model: Path, metadata: bytes) -> None:
    (model / SHARD1).write_bytes(shard(b'{"a":%s,"__metadata__":%s}' % (ENTRY, metadata), 4))
    assert "no map of texts" in refusal(model).what


def test_header_of_a_hundred_megabytes(model: Path) -> None:
    """The most that the format allows is read; one more byte is not."""
    (model / SHARD1).write_bytes(shard(b"{" + b" " * 99_999_998 + b"}", 0))
    with soon(30):
        validate(model, Checks())
    (model / SHARD1).write_bytes(shard(b"{" + b" " * 99_999_999 + b"}", 0))
    assert "claims 100000001 bytes" in refusal(model).what


def test_tensors_without_bytes_may_lie_anywhere_between_the_others(model: Path) -> None:
    tensors = {
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
        "z": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]},
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "y": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]},
    }
    (model / SHARD1).write_bytes(shard(json.dumps(tensors).encode(), 8))
    validate(model, Checks())
    tensors["y"]["data_offsets"] = [6, 6]
    (model / SHARD1).write_bytes(shard(json.dumps(tensors).encode(), 8))
    assert "overlap" in refusal(model).what


def test_many_files_take_seconds_and_more_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "many").mkdir()
    for number in range(5_000):
        (model / f"many/{number}").touch()
    with soon(10):
        assert len(validate(model, Checks()).files) > 5_000
    monkeypatch.setattr(inventory, "MAX_FILES", 5_000)
    assert refusal(model).code == "model_unsafe"


def test_directories_count_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        (model / f"{number}").mkdir()
    monkeypatch.setattr(inventory, "MAX_FILES", 30)
    assert "more than 30 files" in refusal(model).what


def test_depth(model: Path) -> None:
    (model / "/".join("d" * 17)).mkdir(parents=True)
    assert "too deep" in refusal(model).what


def test_two_names_that_differ_in_case_are_two_files_on_this_disk(model: Path) -> None:
    (model / "Config.json").write_text("x")
    validate(model, Checks())


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "/proc/self/environ", "/dev/zero", "loop"])
@pytest.mark.parametrize("name", ["loop", "chat_template.jinja", "sub/deep.json"])
def test_links_out_of_the_tree_and_in_circles(model: Path, name: str, target: str) -> None:
    (model.parent.parent / "outside").write_text("x")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(target)
    with soon(5):
        assert name in refusal(model).what
