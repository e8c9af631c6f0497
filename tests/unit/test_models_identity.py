"""The names that a model has in the store: those that the existing tools compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_models
from vllmd.config.settings import Model
from vllmd.models import identity
from vllmd.models.weights import first_five, has_tokenizer, is_weight, missing_parts

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"),
        ("a--b//c_d é.x", "a-b-c_d-.x"),
        ("a--b", "a-b"),
        ("/a", "-a"),
        ("é☃é", "-"),
    ],
)
def test_slug_squeezes_runs_as_the_existing_tools_do(text: str, slug: str) -> None:
    assert identity.slug(text) == slug


def test_hash_is_that_of_the_id_and_its_revision() -> None:
    assert identity.hash12("meta-llama/Llama-3.1-8B-Instruct") == "08a20b291e44"
    with_revision = tiny_models.request(Path("/s"), revision="v1")
    assert identity.hash12(with_revision.identity) == identity.hash12("acme/Tiny@v1") != identity.hash12("acme/Tiny")


def test_hub_directory_doubles_the_dash_between_organisation_and_name() -> None:
    assert identity.hub_slug("meta-llama/Llama-3.1-8B") == "models--meta-llama--Llama-3.1-8B"


def test_two_directories_of_one_name_have_different_labels() -> None:
    labels = {identity.label(tiny_models.request(Path("/s"), "demo", path=path)) for path in ("/a/demo", "/b/demo")}
    assert len(labels) == 2


@pytest.mark.parametrize(
    ("settings", "name", "model_id"),
    [
        (Model(name="Tiny", org="acme"), "Tiny", "acme/Tiny"),
        (Model(id="acme/Tiny"), "Tiny", "acme/Tiny"),
        (Model(name="mine", id="acme/Tiny"), "mine", "acme/Tiny"),
        (Model(path="/data/tiny/"), "tiny", ""),
        (Model(name="Tiny"), "Tiny", ""),
    ],
)
def test_request_from_settings(settings: Model, name: str, model_id: str) -> None:
    asked = identity.request_from(settings, Path("/store"))
    assert (asked.name, asked.id, asked.store) == (name, model_id, Path("/store"))


@pytest.mark.parametrize(
    "names",
    [
        {"tokenizer.json"},
        {"tokenizer.model"},
        {"spiece.model"},
        {"vocab.txt"},
        {"vocab.json", "merges.txt"},
        {"tokenizer_config.json", "vocab.json"},
        {"tokenizer/tokenizer.json"},
        {"tokenizer_files/vocab.txt"},
        {"tekken.json"},
        {"qwen.tiktoken"},
    ],
)
def test_tokenizer_layouts_that_engines_read(names: set[str]) -> None:
    assert has_tokenizer(names | {"config.json"})


@pytest.mark.parametrize("names", [set(), {"vocab.json"}, {"tokenizer_config.json"}, {"other/tokenizer.json"}, {"tokenizer/x/vocab.txt"}])
def test_no_tokenizer(names: set[str]) -> None:
    assert not has_tokenizer(names)


def test_missing_part_one_is_seen() -> None:
    assert missing_parts(["m-00002-of-00002.safetensors"]) == (["m-00001-of-00002.safetensors"], "")


def test_every_set_must_be_complete_and_not_only_the_first() -> None:
    names = ["a-00001-of-00002.bin", "a-00002-of-00002.bin", "b-00001-of-00002.gguf"]
    assert missing_parts(names) == (["b-00002-of-00002.gguf"], "")


def test_a_part_beyond_its_total_is_wrong() -> None:
    assert missing_parts(["m-00003-of-00002.bin"])[1] == "m-00003-of-00002.bin is part 3 of 2"
    assert missing_parts(["m-00000-of-00002.bin"])[1]


def test_training_state_is_no_weight() -> None:
    assert not is_weight("training_args.bin")
    assert not is_weight("config.json")
    assert is_weight("pytorch_model.bin")


def test_only_the_first_five_are_named() -> None:
    assert first_five([str(number) for number in range(7)]) == "0, 1, 2, 3, 4 and 2 more"
