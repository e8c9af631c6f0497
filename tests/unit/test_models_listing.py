"""What of a source's listing is taken, and what of it is refused before anything is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.errors import ModelInvalid
from vllmd.models.inventory import MAX_FILES
from vllmd.models.listing import checked, selected
from vllmd.models.remote import Listing, RemoteFile

pytestmark = pytest.mark.unit


def listing(*names: str, size: int = 1) -> Listing:
    return Listing(tuple(RemoteFile(name, size) for name in names), "s3://bucket/model")


@pytest.mark.parametrize(
    "name",
    [
        "../x", "a/../../x", "..", ".", "/etc/passwd", "a//b", "a/", "/", "", "a/./b", "a\\b", "a\nb", "a\x00b", "a\x1b[2J", "\u202ex",
        "x" * 300, "/".join("d" * 20), "a/" * 400 + "b",
    ],
)  # fmt: skip
def test_name_that_is_no_file_of_a_model_is_refused(name: str) -> None:
    with pytest.raises(ModelInvalid) as caught:
        checked(listing("config.json", name))
    assert caught.value.code == "model_unsafe"
    assert caught.value.what.isprintable()


@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "config.json"),
        ("config.json", "Config.json"),
        ("straße.json", "STRASSE.json"),
        ("a/x", "A/y"),
        ("a", "a/x"),
        ("a/x", "a"),
        ("a/b/x", "a/B"),
    ],
)
def test_names_that_could_be_one_file_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ModelInvalid):
        checked(listing(*names))


def test_directories_are_shared_by_their_files() -> None:
    names = ("a/x", "a/y", "a/b/x", "a/b/y", "ab", "b")
    assert {file.name for file in checked(listing(*names)).files} == set(names)


@pytest.mark.parametrize("size", [-1, 1 << 60])
def test_absurd_sizes_are_refused(size: int) -> None:
    with pytest.raises(ModelInvalid):
        checked(listing("a", size=size))


def test_too_many_files_are_refused() -> None:
    with pytest.raises(ModelInvalid) as caught:
        checked(listing(*(f"{number}" for number in range(MAX_FILES + 1))))
    assert str(MAX_FILES) in caught.value.what
    checked(listing(*(f"{number}" for number in range(MAX_FILES))))


@given(st.lists(st.text(max_size=30), max_size=8))
def test_whatever_is_accepted_stays_below_its_directory(names: list[str]) -> None:
    try:
        found = checked(listing(*names))
    except ModelInvalid:
        return
    folded = [file.name.casefold() for file in found.files]
    assert len(set(folded)) == len(folded)
    for file in found.files:
        assert not file.name.startswith("/")
        assert not {"", ".", ".."} & set(file.name.split("/"))


def test_beside_safetensors_the_same_weights_in_other_formats_are_left() -> None:
    kept = {"config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "1_Pooling/config.json", "README.md", "vocab.txt"}
    left = {
        ".gitattributes", ".cache/x", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "tf_model.h5",
        "flax_model.msgpack", "rust_model.ot", "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "model.onnx",
    }  # fmt: skip
    assert {file.name for file in selected(listing(*kept, *left), ()).files} == kept


def test_without_safetensors_other_weights_are_the_model() -> None:
    names = {"config.json", "pytorch_model.bin", "model.gguf"}
    assert {file.name for file in selected(listing(*names), ()).files} == names


def test_a_person_excludes_by_pattern() -> None:
    found = selected(listing("config.json", "m.Q4_K_M.gguf", "m.Q8_0.gguf", "sub/m.Q8_0.gguf"), ("*.Q8_0.gguf",))
    assert [file.name for file in found.files] == ["config.json", "m.Q4_K_M.gguf"]
