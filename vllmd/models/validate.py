"""Whether a directory holds a whole model of the Hugging Face layout: seconds here instead of a crash, or nonsense, minutes later.

Reads names, headers and sizes, never the tensors: 100 shards take milliseconds. What hashing finds is in `verify`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vllmd.config.settings import Model
from vllmd.models import gguf, pickles, safetensors, weights
from vllmd.models.inventory import MAX_FILES, Inventory, ModelFile, invalid, is_plain, read_ends, read_small, take
from vllmd.models.ioerrors import explained

MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
"""The largest models' indexes have 20 MB; parsed, hostile JSON takes twenty times its size."""
MAX_TOKENIZER_BYTES = 256 << 20
JSON_TOKENIZERS = ("tokenizer.json", "tekken.json")
MIB, KIB = 1 << 20, 1 << 10


@dataclass(frozen=True, slots=True)
class Checks:
    """What a person may switch off, or (`pickle`) allow."""

    tokenizer: bool = True
    integrity: bool = True
    pickle: bool = False


def checks_of(settings: Model) -> Checks:
    return Checks(
        tokenizer=not settings.skip_tokenizer_check, integrity=not settings.skip_integrity_check, pickle=settings.allow_pickle
    )


def validate(directory: Path, checks: Checks, sealed_ns: int = 0) -> Inventory:
    """The model's files. `directory` is a real path. What it has was validated before `sealed_ns` (`published.sealed_ns`).
    ModelInvalid names the file and the reason; also PermissionMissing, StorageFailed."""
    with explained(f"read {directory}"):
        inventory = take(directory)
        _check_config(inventory)
        if checks.tokenizer:
            _check_tokenizer(inventory)
        touched = _touched(inventory, sealed_ns)
        _check_indexes(inventory, touched)
        _check_parts(inventory)
        _check_weights(inventory)
        if not checks.pickle:
            pickles.refuse(inventory)
        if checks.integrity:
            _check_integrity(inventory, touched)
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
        raise invalid(path, f"is not JSON: {str(error)[:200]}", code="model_corrupt") from None
    if not isinstance(value, dict):
        raise invalid(path, "is not a JSON object", code="model_corrupt")
    return value


def _check_tokenizer(inventory: Inventory) -> None:
    if not weights.has_tokenizer({name for name, file in inventory.files.items() if file.size}):
        reason = "has no tokenizer (tokenizer.json, tokenizer.model, tekken.json, vocab.txt, vocab.json with merges.txt, *.tiktoken)"
        hint = "Add its tokenizer files, or set model.skip_tokenizer_check (VLLM_SKIP_TOKENIZER_CHECK=1) if it needs none."
        raise invalid(inventory.directory, reason, hint, "model_incomplete")
    for place in weights.TOKENIZER_PLACES:
        for name in JSON_TOKENIZERS:
            if place + name in inventory.files:
                _check_ends(inventory.directory / place / name, inventory.files[place + name].size)


def _check_ends(path: Path, size: int) -> None:
    """Such files have 10 to 30 MB, and to parse one takes half a second of every start: a download that broke off, and an
    error page in its place, show at the ends."""
    if size > MAX_TOKENIZER_BYTES:
        raise invalid(path, f"has {size} bytes, which no tokenizer has", code="model_corrupt")
    first, last = read_ends(path, 4096)
    if size and not (first.lstrip(b" \t\r\n").startswith(b"{") and last.rstrip(b" \t\r\n").endswith(b"}")):
        raise invalid(path, "is no JSON object: it does not begin with '{' and end with '}'", code="model_corrupt")


def _touched(inventory: Inventory, sealed_ns: int) -> Collection[str]:
    """The files that somebody touched since. To read 100 headers and their index takes 40 ms of every start; what the disk itself
    damages is found by the pass over all bytes (models/verify), there as in the tensors."""
    return {name for name, file in inventory.files.items() if max(file.mtime_ns, file.ctime_ns) >= sealed_ns}


def _check_indexes(inventory: Inventory, touched: Collection[str]) -> None:
    top = [file.name for file in inventory.top()]
    safetensors_win = any(name.endswith(".safetensors") for name in top)
    for name in top:
        if name in touched and name.endswith(".index.json") and not (safetensors_win and weights.is_pickle_index(name)):
            _check_index(inventory, inventory.directory / name)


def _check_index(inventory: Inventory, path: Path) -> None:
    weight_map = _read_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise invalid(path, "has no weight_map object that names files", code="model_corrupt")  # an engine loads these alone
    named = list(dict.fromkeys(value if isinstance(value, str) else "" for value in weight_map.values()))
    if len(named) > MAX_FILES:
        raise invalid(path, f"names {len(named)} files, which are too many for a model", code="model_unsafe")
    for name in named:
        if not is_plain(name):
            raise invalid(path, f"names {name[:100]!r}, which is no file of this model", code="model_unsafe")
        if str(PurePosixPath(name)) != name:  # an engine compares names as they are written, and would pass over the file
            raise invalid(path, f"names {name[:100]!r}, which is not how that file is called", code="model_corrupt")
    missing = sorted(name for name in named if name not in inventory.files)
    if missing:
        reason = f"{len(missing)} of its {len(named)} files are missing: {weights.first_five(missing)}"
        raise invalid(path, reason, code="model_incomplete")


def _check_parts(inventory: Inventory) -> None:
    missing, wrong = weights.missing_parts(file.name for file in _weights(inventory))
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
    """Those that an engine would load."""
    return [inventory.files[name] for name in weights.loaded(file.name for file in inventory.top())]


def _check_integrity(inventory: Inventory, touched: Collection[str]) -> None:
    files = _weights(inventory)
    largest = max(file.size for file in files)
    for file in files:
        if file.name not in touched:
            continue
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
