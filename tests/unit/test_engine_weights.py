"""Weights that the installed vLLM does not load are refused before it is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmd.engines.vllm_weights import check
from vllmd.errors import ModelInvalid

pytestmark = pytest.mark.unit


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    found = tmp_path / "engine/lib/python3.11/site-packages"
    (found / "vllm/model_executor/model_loader").mkdir(parents=True)
    return found


def ask(tmp_path: Path, *files: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", *files):
        (model / name).touch()
    check(model, str(tmp_path / "engine/bin/vllm"), "0.32.0")


@pytest.mark.usefixtures("packages")
def test_gguf_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelInvalid, match=r"GGUF, which vLLM 0\.32\.0 does not load") as caught:
        ask(tmp_path, "model.Q4_K_M.gguf")
    assert "safetensors" in caught.value.hint


@pytest.mark.usefixtures("packages")
def test_gguf_beside_what_vllm_takes_instead_is_not(tmp_path: Path) -> None:
    ask(tmp_path, "model.Q4_K_M.gguf", "model.safetensors")


@pytest.mark.parametrize("loader", ["vllm/model_executor/model_loader/gguf_loader.py", "vllm_gguf_plugin/__init__.py"])
def test_a_vllm_that_has_a_loader_is_left_to_judge(tmp_path: Path, packages: Path, loader: str) -> None:
    (packages / loader).parent.mkdir(exist_ok=True)
    (packages / loader).touch()
    ask(tmp_path, "model.Q4_K_M.gguf")


def test_an_engine_that_cannot_be_looked_into_is_left_to_judge(tmp_path: Path) -> None:
    ask(tmp_path, "model.Q4_K_M.gguf")
