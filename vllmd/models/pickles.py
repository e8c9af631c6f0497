"""Weights in pickle files: loading one runs whatever its maker put into it, so a person has to say that it may be loaded."""

from __future__ import annotations

import json

from vllmd.models import weights
from vllmd.models.inventory import Inventory, invalid, is_plain, read_small

MODULES = "modules.json"
MAX_MODULES_BYTES = 1 << 20


def refuse(inventory: Inventory) -> None:
    """ModelInvalid if the engine would load a pickle: from the model's root, or from the directory of a module of it."""
    places = ("", *_modules(inventory))
    found = [f"{place}{name}" for place in places for name in _loaded(inventory, place) if weights.is_pickle(name)]
    if not found:
        return
    reason = f"its weights are pickle files ({weights.first_five(found)}), and loading such a file runs any code that its maker put into it"
    hint = (
        "Take a revision or a model with *.safetensors files, or convert these where nothing is at stake. If you trust whoever made "
        "them, set model.allow_pickle: true (VLLMD_ALLOW_PICKLE=1)."
    )
    raise invalid(inventory.directory, reason, hint, "model_pickle")


def _loaded(inventory: Inventory, place: str) -> list[str]:
    """Looked up on the disk: the inventory does not list what lies behind a link to a directory."""
    try:
        return weights.loaded(path.name for path in (inventory.directory / place).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _modules(inventory: Inventory) -> list[str]:
    """The directories of the parts that an embedding model consists of (1_Pooling/, 2_Dense/), which engines load too."""
    if MODULES not in inventory.files:
        return []
    path = inventory.directory / MODULES
    try:
        document = json.loads(read_small(path, MAX_MODULES_BYTES))
    except (ValueError, RecursionError) as error:
        raise invalid(path, f"is not JSON: {str(error)[:200]}", code="model_corrupt") from None
    entries = [entry.get("path", "") for entry in document if isinstance(entry, dict)] if isinstance(document, list) else []
    places = {entry for entry in entries if isinstance(entry, str) and entry}
    for place in places:
        if not is_plain(place):
            raise invalid(path, f"names {place[:100]!r}, which is no directory of this model", code="model_unsafe")
    return sorted(f"{place.rstrip('/')}/" for place in places)
