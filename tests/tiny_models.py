"""Tiny models in the places where real ones lie, for tests."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.models import demo
from vllmd.models.identity import hash12, hub_slug

SOURCES = ("bundled", "local", "hf-cache", "r2", "hf-hub")


def request(store: Path, model_id: str = "acme/Tiny", *, revision: str = "", path: str = "", sources: tuple[str, ...] = SOURCES) -> ModelRequest:
    return ModelRequest(model_id.rpartition("/")[2], model_id, revision, path, sources, store)


def settings(**given: Any) -> Model:
    """Asks no network, unless the test gives it one of its own."""
    return Model(**{"offline": True, **given})


def snapshot(hub: Path, model_id: str, commit: str, *, mtime_s: int = 0, main: bool = False) -> Path:
    """A snapshot as hub clients write it: links to ../../blobs; returns its directory."""
    repository = hub / hub_slug(model_id)
    directory = repository / "snapshots" / commit
    demo.make(directory)
    blobs = repository / "blobs"
    blobs.mkdir(exist_ok=True)
    for file in sorted(directory.iterdir()):
        blob = blobs / f"{commit}-{file.name}"
        file.rename(blob)
        file.symlink_to(f"../../blobs/{blob.name}")
    if mtime_s:
        os.utime(directory, (mtime_s, mtime_s))
    if main:
        write_ref(repository, "main", commit)
    return directory


def write_ref(repository: Path, name: str, commit: str) -> None:
    path = repository / "refs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


def write_provenance(directory: Path, asked: ModelRequest, **changes: str) -> None:
    lines = {
        "schema": "1",
        "complete": "1",
        "model": asked.name,
        "model_id": asked.id,
        "model_identity": asked.identity,
        "identity_hash": hash12(asked.identity),
        "model_revision": asked.revision,
        "resolved_via": "hf-hub",
    } | changes
    (directory / ".vllm-model-provenance").write_text("".join(f"{key}={value}\n" for key, value in lines.items()))


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tree(directory: Path) -> Mapping[str, tuple[int, int]]:
    """What lies in a directory: to show that nothing in it was touched."""
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in sorted(directory.rglob("*"))}
