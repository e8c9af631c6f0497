"""Each way in which a model can be incomplete, damaged or hostile is named, with the file."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests import tiny_models
from tests.gguf_files import KEY, PADDING, TENSOR, gguf
from tests.refusals import SHARD1, SHARD2, refusal
from vllmd.config.settings import Model
from vllmd.errors import ModelInvalid
from vllmd.models import demo
from vllmd.models.validate import Checks, checks_of, validate

pytestmark = pytest.mark.unit

INDEX = "model.safetensors.index.json"


def header(tensors: Mapping[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


@pytest.mark.parametrize("kind", demo.KINDS)
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_whole_models_are_accepted(tmp_path: Path, kind: str, shards: int) -> None:
    directory = demo.make(tmp_path, kind, shards)
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert validate(directory, Checks()).bytes == sum(path.stat().st_size for path in files) < 1_000_000


def test_demo_models_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = (demo.make(tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in sorted(first.iterdir())] == [path.read_bytes() for path in sorted(second.iterdir())]


def test_demo_tokenizer_is_one_that_the_library_reads(model: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    text = "Hello, is the server ready? é ☃"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == demo.VOCAB


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    assert f"{model}/config.json: missing" in refusal(model).what


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"x"', "\ufeff"])
def test_config_that_is_no_object(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert f"{model}/config.json" in refusal(model).what


def test_directory_of_a_hub_cache_entry_says_which_directory_is_meant(tmp_path: Path) -> None:
    directory = tiny_models.snapshot(tmp_path, "acme/Tiny", "c1")
    assert "snapshots/REVISION" in refusal(directory.parents[1]).hint


def test_no_tokenizer_unless_the_check_is_skipped(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(model).what
    validate(model, Checks(tokenizer=False))


def test_empty_tokenizer_is_none(model: Path) -> None:
    (model / "tokenizer.json").write_text("")
    assert "no tokenizer" in refusal(model).what


def test_missing_shards_of_the_index_are_named_five_at_most(model: Path) -> None:
    tiny_models.write_index(model, {f"t{number}": f"gone-{number}.safetensors" for number in range(7)})
    said = refusal(model).what
    assert f"{model}/{INDEX}: 7 of its 7 files are missing: gone-0.safetensors" in said
    assert "gone-4.safetensors and 2 more" in said
    assert "gone-5" not in said


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "", "a\\b", "a\nb", 3, None])
def test_index_that_names_what_is_no_file_of_the_model(model: Path, name: object) -> None:
    tiny_models.write_index(model, {"t": name})
    error = refusal(model)
    assert error.code == "model_unsafe"
    assert INDEX in error.what


@pytest.mark.parametrize("weight_map", [[], {}, None, "x"])
def test_index_without_a_map(model: Path, weight_map: object) -> None:
    tiny_models.write_index(model, weight_map)
    assert "no weight_map" in refusal(model).what


@pytest.mark.parametrize("name", [SHARD1, SHARD2])
def test_missing_part_without_an_index(model: Path, name: str) -> None:
    (model / INDEX).unlink()
    (model / name).unlink()
    assert f"1 parts of split weights are missing: {name}" in refusal(model).what


def test_second_set_that_is_incomplete(model: Path) -> None:
    (model / "other-00002-of-00003.safetensors").write_bytes(b"x" * 2000)
    assert "2 parts of split weights are missing: other-00001-of-00003.safetensors" in refusal(model).what


def test_no_weights(model: Path) -> None:
    for name in (INDEX, SHARD1, SHARD2):
        (model / name).unlink()
    (model / "training_args.bin").write_bytes(b"x")
    assert "has no weights" in refusal(model).what


def test_truncated_data_is_seen_though_the_header_is_whole(model: Path) -> None:
    size = (model / SHARD2).stat().st_size
    os.truncate(model / SHARD2, size - 5)
    assert f"{model}/{SHARD2}: truncated: 5 bytes are missing" in refusal(model).what
    validate(model, Checks(integrity=False))


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 10**6])
def test_header_length_that_cannot_be(model: Path, length: int) -> None:
    (model / SHARD1).write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    assert f"{model}/{SHARD1}: truncated or not safetensors: its header claims {length} bytes" in refusal(model).what


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"1234567", "7 bytes are no safetensors file"),
        (struct.pack("<Q", 3) + b"{bc", "not JSON"),
        (struct.pack("<Q", 600_000) + b'{"a":' * 120_000, "not JSON"),
        (struct.pack("<Q", 9) + b'{"a": 9e}', "not JSON"),
        (struct.pack("<Q", 5000) + b'{"a":' + b"9" * 4994 + b"}", "not JSON"),
        (header([]), "does not begin with '{'"),  # type: ignore[arg-type]
        (struct.pack("<Q", 3) + b" {}", "does not begin with '{'"),
        (header({"__metadata__": {"format": 1}, "a": tensor(0, 4)}, b"x" * 4), "__metadata__"),
        (header({"a": tensor(0, 1, data_offsets=[False, True])}, b"x"), "wrong about tensor 'a'"),
        (header({"a": tensor(0, 4), "z": tensor(4, 4), "b": tensor(4, 8)}, b"x" * 7), "truncated: 1 bytes are missing"),
        (header({"a": tensor(0, 4), "b": tensor(2, 6)}, b"x" * 6), "overlap at byte 2"),
        (header({"a": tensor(0, 4), "b": tensor(5, 6)}, b"x" * 6), "leave a gap at byte 5"),
        (header({"a": tensor(0, 4)}, b"x" * 6), "2 bytes follow its last tensor"),
        (header({"a": tensor(0, 4, shape=[5])}, b"x" * 4), "wrong about tensor 'a'"),
        (header({"a": tensor(4, 0, shape=[0])}, b"x" * 4), "wrong about tensor 'a'"),
        (header({"a": tensor(0, 4, dtype="F32")}, b"x" * 4), "wrong about tensor 'a'"),
        (header({"a": tensor(0, 4, shape=[-2, -2])}, b"x" * 4), "wrong about tensor 'a'"),
        (header({"a": {"dtype": "U8"}}, b"x" * 4), "wrong about tensor 'a'"),
        (header({"a": 3}), "wrong about tensor 'a'"),
        (header({"a": tensor(0, 2**60)}), "truncated"),
    ],
)
def test_safetensors_that_are_wrong_inside(model: Path, content: bytes, said: str) -> None:
    (model / SHARD1).write_bytes(content)
    error = refusal(model)
    assert said in error.what
    assert SHARD1 in error.what


@pytest.mark.parametrize("shape", [f"[{','.join(['9' * 4000] * 3000)}]", f"[{','.join(['1'] * 65)},256]"])
def test_a_shape_that_no_tensor_has_costs_milliseconds(model: Path, shape: str) -> None:
    text = f'{{"w": {{"dtype": "U8", "shape": {shape}, "data_offsets": [0, 256]}}}}'.encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(256))
    started = time.process_time()
    assert "wrong about tensor 'w'" in refusal(model).what
    assert time.process_time() - started < 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_json_that_engines_do_not_read_is_refused(model: Path, encoding: str) -> None:
    (model / "config.json").write_bytes((model / "config.json").read_text().encode(encoding))
    assert "config.json: is not JSON" in refusal(model).what


def test_names_of_a_hostile_model_do_not_reach_the_terminal_as_they_are(model: Path) -> None:
    (model / "a\n\x1b[2J\udcff.safetensors").write_bytes(b"1234567")
    what = refusal(model).what
    assert what.isprintable()
    assert "a\\n\\x1b[2J" in what


def test_a_name_of_any_length_in_an_index_is_said_in_a_line(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {str(at): str(at) * 100_000 for at in range(9)}}))
    assert len(refusal(model).what) < 2000


def test_tensors_of_a_type_newer_than_this_program_are_left_to_the_engine(model: Path) -> None:
    (model / SHARD1).write_bytes(header({"a": tensor(0, 4, dtype="F3_E1M1")}, b"x" * 4))
    validate(model, Checks())


def test_files_that_the_library_writes_are_accepted(model: Path) -> None:
    numpy, writer = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy")
    tensors = {"a": numpy.zeros((3, 5), numpy.float16), "b": numpy.zeros((0, 4), numpy.int64), "c": numpy.zeros((), numpy.float32)}
    writer.save_file(tensors, model / SHARD1, {"format": "pt"})
    validate(model, Checks())


@pytest.fixture
def pickled(model: Path) -> Path:
    """A model with nothing but pickle files for weights."""
    for path in model.glob("model*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x" * 2000)
    return model


PICKLED = Checks(pickle=True)


def test_empty_weight(pickled: Path) -> None:
    (pickled / "extra.bin").write_bytes(b"")
    assert f"{pickled}/extra.bin: is empty" in refusal(pickled, PICKLED).what


def test_tiny_weight_beside_a_large_one(pickled: Path) -> None:
    (pickled / "a.bin").write_bytes(b"x" * 1023)
    validate(pickled, PICKLED)
    (pickled / "b.bin").write_bytes(bytes((1 << 20) + 1))
    assert f"{pickled}/a.bin: has 1023 bytes" in refusal(pickled, PICKLED).what
    (pickled / "a.bin").write_bytes(b"x" * 1024)
    validate(pickled, PICKLED)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl", "pytorch_model-00001-of-00001.bin"])
def test_pickle_weights_need_a_word_of_a_person(pickled: Path, name: str) -> None:
    (pickled / "pytorch_model.bin").rename(pickled / name)
    error = refusal(pickled, Checks(integrity=False))
    assert error.code == "model_pickle"
    assert name in error.what
    assert "model.allow_pickle" in error.hint
    assert "VLLMD_ALLOW_PICKLE=1" in error.hint
    validate(pickled, PICKLED)
    assert not checks_of(Model()).pickle
    assert checks_of(Model(allow_pickle=True)).pickle


@pytest.mark.parametrize("companion", ["model.gguf", ".hidden.safetensors", "sub/model.safetensors"])
def test_pickles_are_refused_beside_what_an_engine_would_not_take_instead(pickled: Path, companion: str) -> None:
    (pickled / companion).parent.mkdir(exist_ok=True)
    (pickled / companion).write_bytes(gguf(KEY, TENSOR + PADDING, counts=(1, 2), data=b"x" * 16))
    assert refusal(pickled).code == "model_pickle"


def test_pickles_beside_safetensors_are_nothing_to_the_engine(model: Path) -> None:
    """Also damaged, in part, and with an index that names what was never fetched."""
    (model / "pytorch_model-00002-of-00003.bin").write_bytes(b"")
    (model / "original").mkdir()
    (model / "original/consolidated.00.pth").write_bytes(b"x")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"t": "pytorch_model-00001-of-00003.bin"}}))
    validate(model, Checks())


def test_index_of_pickles_that_are_loaded_is_checked(pickled: Path) -> None:
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"t": "gone.bin"}}))
    assert "gone.bin" in refusal(pickled, PICKLED).what


@pytest.mark.parametrize("is_link", [False, True])
def test_pickles_of_an_embedding_models_modules(model: Path, is_link: bool) -> None:
    dense = model / ("real" if is_link else "2_Dense")
    dense.mkdir()
    if is_link:
        (model / "2_Dense").symlink_to("real")
    (dense / "pytorch_model.bin").write_bytes(b"x")
    validate(model, Checks())
    (model / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, 3]))
    assert "2_Dense/pytorch_model.bin" in refusal(model).what
    validate(model, PICKLED)
    (dense / "model.safetensors").write_bytes(header({}))
    validate(model, Checks())


@pytest.mark.parametrize(("text", "code"), [("[", "model_corrupt"), ('[{"path": "../x"}]', "model_unsafe"), ('[{"path": "/etc"}]', "model_unsafe")])
def test_modules_that_are_no_modules(model: Path, text: str, code: str) -> None:
    (model / "modules.json").write_text(text)
    assert refusal(model).code == code


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json"])
@pytest.mark.parametrize("text", ["[]", '{"a": 1', "<html></html>", "\ufeff{}", "   "])
def test_tokenizer_that_is_no_object(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    assert f"{model}/{name}: is no JSON object" in refusal(model).what
    validate(model, Checks(tokenizer=False))


def test_large_tokenizer_is_not_parsed(model: Path) -> None:
    """It would take most of the time of a start that finds nothing to do."""
    (model / "tokenizer.json").write_bytes(b"{" + b"[" * (40 << 20) + b"}\n")
    started = time.process_time()
    validate(model, Checks())
    assert time.process_time() - started < 1
    os.truncate(model / "tokenizer.json", 300 << 20)
    assert "which no tokenizer has" in refusal(model).what


@pytest.mark.parametrize("name", ["tekken.json", "qwen.tiktoken", "tokenizer_files/spiece.model"])
def test_other_layouts_of_tokenizers(model: Path, name: str) -> None:
    (model / "tokenizer.json").unlink()
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{}")
    validate(model, Checks())


def test_headers_of_a_hundred_shards_take_milliseconds(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    directory = demo.make(tmp_path, shards=1)
    tensors = {f"model.layers.{number}.weight": tensor(number * 8, number * 8 + 8) for number in range(10)}
    content = header(tensors, bytes(80))
    (directory / "model.safetensors").unlink()
    for part in range(1, 101):
        (directory / f"model-{part:05}-of-00100.safetensors").write_bytes(content)
    started = time.process_time()
    validate(directory, Checks())
    record_property("seconds", time.process_time() - started)
    assert time.process_time() - started < 1.0  # 16 ms on an idle machine; a loop over the data would take far longer


@pytest.mark.parametrize("damage", ["unlink", "mode"])
def test_what_cannot_be_read_is_said_with_its_path(model: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllmd.errors import PermissionMissing
    from vllmd.models import safetensors

    def fail(path: Path, name: str) -> int:
        error = PermissionError(13, "Permission denied", str(path / name)) if damage == "mode" else FileNotFoundError(2, "gone", str(path / name))
        raise error

    monkeypatch.setattr(safetensors, "open_file", fail)
    with pytest.raises(PermissionMissing if damage == "mode" else ModelInvalid, match=SHARD1):
        validate(model, Checks())
