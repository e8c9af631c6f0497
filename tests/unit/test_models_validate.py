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
from vllmd.config.settings import Model
from vllmd.errors import ModelInvalid, Status
from vllmd.models import demo
from vllmd.models import gguf as gguf_format
from vllmd.models.validate import Checks, checks_of, validate

pytestmark = pytest.mark.unit

SHARD1, SHARD2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return demo.make(tmp_path / "model")


def refusal(directory: Path, checks: Checks | None = None) -> ModelInvalid:
    with pytest.raises(ModelInvalid) as caught:
        validate(directory, checks or Checks())
    assert caught.value.status is Status.DATAERR
    assert caught.value.hint
    return caught.value


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


def gguf(keys: bytes = b"", tensors: bytes = b"", version: int = 3, counts: tuple[int, int] = (0, 0), data: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + keys + tensors + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


KEY = text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b") + text("n") + struct.pack("<II", 4, 7)
TENSOR = text("t") + struct.pack("<IQIQ", 1, 4, 0, 0)
PADDING = bytes(-(24 + len(KEY) + len(TENSOR)) % 32)


def block(kind: int, elements: int, *, offset: int = 0, data: int = 0, keys: bytes = b"", count: int = 0) -> bytes:
    """A file with one tensor, and `data` bytes after the padding."""
    entry = text("t") + struct.pack("<IQIQ", 1, elements, kind, offset)
    head = gguf(keys, entry, counts=(1, count))
    return head + bytes(-len(head) % 32) + bytes(data)


def alignment(value: int) -> bytes:
    return text("general.alignment") + struct.pack("<II", 4, value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gguf(KEY, TENSOR + PADDING, counts=(1, 2), data=b"x" * 16), ""),
        (gguf(KEY, TENSOR + PADDING, counts=(1, 2), data=b"x" * 15), "1 bytes are missing"),
        (block(12, 512, data=288), ""),
        (block(12, 512, data=287), "1 bytes are missing"),
        (block(12, 500, data=288), "no multiple of 256"),
        (block(2, 64, offset=64, data=64 + 36), ""),
        (block(2, 64, offset=64, data=64 + 35), "1 bytes are missing"),
        (block(2, 64, offset=33, data=200), "no multiple of 32"),
        (gguf(b"", text("t") + struct.pack("<IIQ", 0, 2, 0), counts=(1, 0), data=bytes(99)), "rows of 1 elements"),
        (block(999, 1 << 60, data=1), ""),
        (block(999, 1 << 60), "are missing"),
        (block(0, 1 << 63, data=1), "are missing"),
        (block(0, 8, offset=8, data=40, keys=alignment(8), count=1), ""),
        (block(0, 8, data=40, keys=alignment(0), count=1), "alignment of 0"),
        (block(0, 8, data=40, keys=alignment(48), count=1), "alignment of 48"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (gguf(text("k") + struct.pack("<IIQ", 9, 9, 2) + struct.pack("<IQ", 8, 6_000_000) * 2, counts=(0, 1)), "ends within"),
        (b"GGML" + b"x" * 100, "does not begin with GGUF"),
        (gguf()[:20], "does not begin with GGUF"),
        (gguf(version=0), "version 0"),
        (gguf(version=101), "version 101"),
        (gguf(counts=(10**8, 0)), "100000000 tensors"),
        (gguf(counts=(0, 2**63)), "keys"),
        (gguf(KEY[:20], counts=(0, 2)), "ends within its header"),
        (gguf(text("k") + struct.pack("<IIQ", 9, 4, 10**9), counts=(0, 1)), "items in an array"),
        (gguf(text("k") + struct.pack("<I", 99), counts=(0, 1)), "unknown type 99"),
        (gguf(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50, counts=(0, 1)), "unknown type 9"),
        (gguf(b"", TENSOR, counts=(1, 0)), "are missing"),
        (gguf(struct.pack("<Q", 2**63), counts=(0, 1)), "ends within its header"),
    ],
)
def test_gguf(model: Path, content: bytes, said: str) -> None:
    (model / "model.gguf").write_bytes(content)
    if said:
        assert said in refusal(model).what
    else:
        validate(model, Checks())


def test_gguf_whose_header_is_longer_than_the_first_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_format, "FIRST_BYTES", 30)
    content = gguf(KEY, TENSOR + PADDING, counts=(1, 2), data=b"x" * 16)
    (model / "model.gguf").write_bytes(content)
    validate(model, Checks())
    (model / "model.gguf").write_bytes(content[:-1])
    assert "1 bytes are missing" in refusal(model).what
    monkeypatch.setattr(gguf_format, "MAX_HEADER_BYTES", 30)
    assert "longer than 30 bytes" in refusal(model).what


def test_gguf_with_a_vocabulary_takes_milliseconds(model: Path) -> None:
    words = b"".join(text(str(number)) for number in range(250_000))
    key = text("tokens") + struct.pack("<IIQ", 9, 8, 250_000) + words
    (model / "model.gguf").write_bytes(gguf(key, counts=(0, 1)))
    started = time.process_time()
    validate(model, Checks())
    assert time.process_time() - started < 3  # 0.2 s on an idle machine


def test_part_of_a_split_gguf_is_missed(model: Path) -> None:
    (model / "big-00001-of-00002.gguf").write_bytes(gguf())
    assert "big-00002-of-00002.gguf" in refusal(model).what


def test_link_that_leaves_the_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"x" * 2000)
    (model / "extra.bin").symlink_to("../secret.bin")
    error = refusal(model)
    assert error.code == "model_unsafe"
    assert f"{model}/extra.bin: is a link that leaves the model's directory, to {tmp_path}/secret.bin" in error.what


def test_link_to_a_directory_outside(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer").symlink_to(tmp_path)
    assert refusal(model).code == "model_unsafe"


def test_link_inside_the_model(model: Path) -> None:
    (model / "again.json").symlink_to("config.json")
    validate(model, Checks())


def test_snapshot_may_link_to_the_blobs_of_its_own_repository_only(tmp_path: Path) -> None:
    directory = tiny_models.snapshot(tmp_path / "hub", "acme/Tiny", "c1")
    validate(directory, Checks())
    other = tiny_models.snapshot(tmp_path / "hub", "acme/Other", "c1")
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to(other / "config.json")
    assert refusal(directory).code == "model_unsafe"


def test_snapshot_of_a_cache_with_shared_blobs(tmp_path: Path) -> None:
    """Newer hub clients let a repository's blobs link on to blobs/ of the whole cache."""
    directory = tiny_models.snapshot(tmp_path / "hub", "acme/Tiny", "c1")
    shared = tmp_path / "hub/blobs/ab/abcd"
    shared.parent.mkdir(parents=True)
    blob = (directory / SHARD1).resolve()
    blob.rename(shared)
    blob.symlink_to("../../blobs/ab/abcd")
    validate(directory, Checks())


def test_snapshot_whose_blob_is_missing(tmp_path: Path) -> None:
    directory = tiny_models.snapshot(tmp_path / "hub", "acme/Tiny", "c1")
    (directory / SHARD2).resolve().unlink()
    assert "which does not exist" in refusal(directory).what


def test_fifo_is_refused_and_not_waited_for(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    assert "neither a file nor a directory" in refusal(model).what


def test_notes_of_download_tools_are_not_looked_at(model: Path) -> None:
    (model / ".cache/huggingface").mkdir(parents=True)
    (model / ".cache/huggingface/x.lock").symlink_to("/nowhere")
    (model / ".complete").touch()
    assert not any(name.startswith(".") for name in validate(model, Checks()).files)


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
