"""A tokenizer class that the engine does not know: served from a shadow, only where it must be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vllmd.engines.vllm_tokenizer import CONFIG, FALLBACK, prepare
from vllmd.models import demo

pytestmark = pytest.mark.unit
STRICT = 'MAP = [("llama", ("LlamaTokenizer", "LlamaTokenizerFast")), ("slow", ("SlowTokenizer", None))]\nraise ValueError("does not exist or is not currently imported")'


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    package = tmp_path / "engine/lib/python3.11/site-packages/transformers"
    (package / "models/auto").mkdir(parents=True)
    (package / "models/rare").mkdir()
    (package / "__init__.py").write_text('X = ["ExportedTokenizer"]')
    (package / "models/auto/tokenization_auto.py").write_text(STRICT)
    (package / "models/rare/tokenization_rare.py").write_text("class RareTokenizerFast(Base): pass")
    (tmp_path / "cache").mkdir()
    return tmp_path / "engine/bin/vllm"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = demo.make(tmp_path / "model")
    (directory / "sub").mkdir()
    (directory / "sub/x").write_text("x")
    name(directory, "NoSuchTokenizer")
    return directory


def name(directory: Path, chosen: Any, **more: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": chosen, **more}))


def asked(model: Path, engine: Path) -> tuple[Path, str]:
    return prepare(model, str(engine), engine.parents[2] / "cache")


def test_unknown_class_is_replaced_in_a_shadow(model: Path, engine: Path) -> None:
    before = (model / CONFIG).read_bytes()
    shadow, said = asked(model, engine)
    assert shadow.parent == engine.parents[2] / "cache/tokenizers"
    assert "NoSuchTokenizer" in said
    assert FALLBACK in said
    assert json.loads((shadow / CONFIG).read_text()) == json.loads(before) | {"tokenizer_class": FALLBACK}
    assert (model / CONFIG).read_bytes() == before
    assert {path.name for path in shadow.iterdir()} == {path.name for path in model.iterdir()}
    assert all((shadow / path.name).samefile(path) for path in model.iterdir() if path.name != CONFIG)
    assert [path.name for path in shadow.parent.iterdir()] == [shadow.name]


@pytest.mark.parametrize("known", ["LlamaTokenizer", "LlamaTokenizerFast", "SlowTokenizer", "RareTokenizer", "ExportedTokenizer", FALLBACK, None, 3, ""])
def test_known_class_is_left_alone(model: Path, engine: Path, known: object) -> None:
    name(model, known)
    assert asked(model, engine) == (model, "")


def test_fast_variant_that_is_missing_is_not_the_slow_one(model: Path, engine: Path) -> None:
    name(model, "SlowTokenizerFast")
    assert asked(model, engine)[0] != model


def test_engine_that_falls_back_itself_needs_no_shadow(model: Path, engine: Path) -> None:
    (engine.parents[1] / "lib/python3.11/site-packages/transformers/models/auto/tokenization_auto.py").write_text("tokenizer_class = TokenizersBackend")
    assert asked(model, engine) == (model, "")


def test_engine_without_a_package_to_look_at(model: Path, tmp_path: Path) -> None:
    assert prepare(model, str(tmp_path / "elsewhere/bin/vllm"), tmp_path) == (model, "")


@pytest.mark.parametrize("where", [CONFIG, "config.json"])
def test_class_that_the_model_brings_is_left_alone(model: Path, engine: Path, where: str) -> None:
    path = model / where
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["x.X", None]}}))
    assert asked(model, engine) == (model, "")


def test_without_tokenizer_json_it_is_only_said(model: Path, engine: Path) -> None:
    (model / "tokenizer.json").unlink()
    directory, said = asked(model, engine)
    assert directory == model
    assert "without a tokenizer.json" in said


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_config_that_cannot_be_understood_is_left_to_the_engine(model: Path, engine: Path, text: str) -> None:
    (model / CONFIG).write_text(text)
    assert asked(model, engine) == (model, "")


def test_shadow_is_used_again(model: Path, engine: Path) -> None:
    first, inode = asked(model, engine)[0], asked(model, engine)[0].stat().st_ino
    assert asked(model, engine)[0] == first
    assert first.stat().st_ino == inode


@pytest.mark.parametrize("damage", ["config", "link", "missing", "added", "gone"])
def test_shadow_that_is_not_intact_is_made_anew(model: Path, engine: Path, damage: str) -> None:
    shadow, _ = asked(model, engine)
    match damage:
        case "config":
            (shadow / CONFIG).write_text("{}")
        case "link":
            (shadow / "config.json").unlink()
            (shadow / "config.json").symlink_to("/etc/passwd")
        case "missing":
            (shadow / "config.json").unlink()
        case "added":
            (model / "new.json").write_text("{}")
        case _:
            shadow.rename(shadow.with_name("away"))
            shadow.symlink_to("/")
    assert asked(model, engine)[0] == shadow
    assert not shadow.is_symlink()
    assert {path.name: os.path.realpath(path) for path in shadow.iterdir() if path.name != CONFIG} == {
        path.name: os.path.realpath(path) for path in model.iterdir() if path.name != CONFIG
    }
    assert json.loads((shadow / CONFIG).read_text())["tokenizer_class"] == FALLBACK


def test_older_shadow_of_the_same_model_goes_and_another_models_stays(model: Path, engine: Path, tmp_path: Path) -> None:
    other = demo.make(tmp_path / "other")
    name(other, "NoSuchTokenizer")
    kept, old = asked(other, engine)[0], asked(model, engine)[0]
    name(model, "StillNoSuchTokenizer", extra=1)
    new = asked(model, engine)[0]
    assert set(new.parent.iterdir()) == {kept, new}
    assert old != new
