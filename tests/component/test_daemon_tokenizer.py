"""A model whose tokenizer class the engine's transformers lacks: the engine is given a shadow of it, and that is said."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.harness import Instance

pytestmark = pytest.mark.component

STRICT = 'MAP = [("llama", ("LlamaTokenizer", "LlamaTokenizerFast"))]\nraise ValueError("does not exist or is not currently imported")'


@pytest.fixture
def odd(tmp_path: Path) -> Instance:
    """Not started: its engine has a transformers that knows one class, and its model names another."""
    instance = Instance()
    package = instance.root / "engines/vllm-0.32.0-fake/lib/python3.11/site-packages/transformers"
    (package / "models/auto").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models/auto/tokenization_auto.py").write_text(STRICT)
    config = instance.root / "model-generate/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "NoSuchTokenizer"}))
    return instance


def test_engine_is_given_a_shadow_with_a_class_that_it_has(odd: Instance) -> None:
    with odd as instance:
        instance.wait_ready()
        model = instance.root / "model-generate"
        shadow = Path(instance.engine_process("main").cmdline.split(" serve ")[1].split()[0])
        assert shadow.is_relative_to(instance.root / "cache")
        assert json.loads((shadow / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert json.loads((model / "tokenizer_config.json").read_text())["tokenizer_class"] == "NoSuchTokenizer"
        assert (shadow / "config.json").resolve() == (model / "config.json").resolve()
        assert "NoSuchTokenizer" in instance.log()
        assert instance.status()["model"]["directory"] == str(model)


def test_so_is_an_engine_without_a_supervisor(odd: Instance) -> None:
    try:
        done = subprocess.run(odd.command("serve", odd.name, "--dry-run"), env=odd.env, capture_output=True, text=True, check=True, timeout=60)
        assert f"{odd.root}/cache/" in done.stdout + done.stderr
        assert "NoSuchTokenizer" in done.stderr
    finally:
        odd.close()
