"""Links, fifos and what else a directory may hold beside a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import tiny_models
from tests.refusals import SHARD1, SHARD2, refusal
from vllmd.models.validate import Checks, validate

pytestmark = pytest.mark.unit


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
