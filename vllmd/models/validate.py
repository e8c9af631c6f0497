"""Whether a directory holds a whole model of the Hugging Face layout: seconds here instead of a crash, or nonsense, minutes later.

Reads names, headers and sizes, never the tensors: 100 shards take milliseconds. What hashing finds is in `verify`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.config.settings import Model
from vllmd.models import gguf, safetensors, weights
from vllmd.models.inventory import Inventory, ModelFile, invalid, is_plain, read_small, take
from vllmd.models.ioerrors import explained

MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 256 << 20
MIB, KIB = 1 << 20, 1 << 10


@dataclass(frozen=True, slots=True)
class Checks:
    """What a person may switch off."""

    tokenizer: bool = True
    integrity: bool = True


def checks_of(settings: Model) -> Checks:
    return Checks(tokenizer=not settings.skip_tokenizer_check, integrity=not settings.skip_integrity_check)


def validate(directory: Path, checks: Checks) -> Inventory:
    """The model's files. `directory` is a real path. ModelInvalid names the file and the reason; also PermissionMissing, StorageFailed."""
    with explained(f"read {directory}"):
        inventory = take(directory)
        _check_config(inventory)
        if checks.tokenizer:
            _check_tokenizer(inventory)
        _check_indexes(inventory)
        _check_parts(inventory)
        _check_weights(inventory)
        if checks.integrity:
            _check_integrity(inventory)
        return inventory


def _check_config(inventory: Inventory) -> None:
    path = inventory.directory / "config.json"
    if "config.json" not in inventory.files:
        hint = "Give the directory that holds config.json."
        if (inventory.directory / "snapshots").is_dir():
            hint = "This is a model's directory in a hub cache: give its snapshots/REVISION, or the model's id."
        raise invalid(path, "missing: this is no model directory", hint, "model_incomplete")
    _read_object(path, MAX_CONFIG_BYTES)


def _read_object(path: Path, limit_bytes: int) -> dict[str, Any]:
    try:
        value = json.loads(read_small(path, limit_bytes).decode("utf-8"))  # bytes would be taken as UTF-16 too, which no engine reads
    except (ValueError, RecursionError) as error:
        raise invalid(path, f"is not JSON: {error}", code="model_corrupt") from None
    if not isinstance(value, dict):
        raise invalid(path, "is not a JSON object", code="model_corrupt")
    return value


def _check_tokenizer(inventory: Inventory) -> None:
    if not weights.has_tokenizer({name for name, file in inventory.files.items() if file.size}):
        reason = "has no tokenizer (tokenizer.json, tokenizer.model, tekken.json, vocab.txt, vocab.json with merges.txt, *.tiktoken)"
        hint = "Add its tokenizer files, or set model.skip_tokenizer_check (VLLM_SKIP_TOKENIZER_CHECK=1) if it needs none."
        raise invalid(inventory.directory, reason, hint, "model_incomplete")


def _check_indexes(inventory: Inventory) -> None:
    for file in inventory.top():
        if file.name.endswith(".index.json"):
            _check_index(inventory, inventory.directory / file.name)


def _check_index(inventory: Inventory, path: Path) -> None:
    weight_map = _read_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise invalid(path, "has no weight_map object that names files", code="model_corrupt")  # an engine loads these alone
    named = list(dict.fromkeys(value if isinstance(value, str) else "" for value in weight_map.values()))
    for name in named:
        if not is_plain(name):
            raise invalid(path, f"names {name[:100]!r}, which is no file of this model", code="model_unsafe")
    missing = sorted(name for name in named if name not in inventory.files)
    if missing:
        reason = f"{len(missing)} of its {len(named)} files are missing: {weights.first_five(missing)}"
        raise invalid(path, reason, code="model_incomplete")


def _check_parts(inventory: Inventory) -> None:
    missing, wrong = weights.missing_parts(file.name for file in inventory.top())
    if wrong:
        raise invalid(inventory.directory, wrong, code="model_corrupt")
    if missing:
        reason = f"{len(missing)} parts of split weights are missing: {weights.first_five(missing)}"
        raise invalid(inventory.directory, reason, code="model_incomplete")


def _check_weights(inventory: Inventory) -> None:
    if not _weights(inventory):
        kinds = ", ".join(f"*.{extension}" for extension in weights.EXTENSIONS)
        raise invalid(inventory.directory, f"has no weights ({kinds})", code="model_incomplete")


def _weights(inventory: Inventory) -> list[ModelFile]:
    return [file for file in inventory.top() if weights.is_weight(file.name)]


def _check_integrity(inventory: Inventory) -> None:
    files = _weights(inventory)
    largest = max(file.size for file in files)
    for file in files:
        path = inventory.directory / file.name
        with explained(f"read {path}"):
            _check_weight(path, file, largest)


def _check_weight(path: Path, file: ModelFile, largest: int) -> None:
    if file.size == 0:
        raise invalid(path, "is empty", code="model_truncated")
    if file.name.endswith(".safetensors"):
        safetensors.check(path.parent, file.name)
    elif file.name.endswith(".gguf"):
        gguf.check(path.parent, file.name)
    elif file.size < KIB and largest > MIB:
        raise invalid(path, f"has {file.size} bytes, beside weights of {largest}: truncated", code="model_truncated")
