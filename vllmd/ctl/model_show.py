"""`vllmctl model show|clear`: what was chosen and what is in force; and no model at all.

JSON of `show`, schema 1: {"schema": 1, "instance", "choice", "preset", "tier", "flags", "cleared", "edited_by_hand", "file", "model", "model_from", "gpus",
"tensor_parallel_size", "max_model_len", "served_model_name"}; of `clear`: {"schema": 1, "instance", "file", "notes", "restarted"}.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from vllmd.config import layers
from vllmd.config.given import BUILT_IN
from vllmd.config.paths import Paths
from vllmd.config.redact import redact_argv
from vllmd.config.values import printable
from vllmd.ctl import model_file, model_set, model_wish
from vllmd.ctl import unit as units
from vllmd.ctl.model_file import Chosen
from vllmd.errors import UsageError
from vllmd.models.identity import request_from

_NO_MODEL = {"model": ""}


def show(paths: Paths, name: str, *, as_json: bool) -> int:
    """0, or 3 where no model is selected."""
    name = _existing(paths, name)
    document = as_dict(paths, name)
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        sys.stdout.write(printable("\n".join(_lines(document, paths)) + "\n"))
    return 0 if document["model"] else 3


def _existing(paths: Paths, given: str) -> str:
    name = units.instance_name(given)
    if not paths.instance_config(name).exists():
        raise UsageError("instance_unknown", f"there is no instance {name} ({paths.instance_config(name)})", f"{paths.vllmctl} model set {name} PRESET makes it; {paths.vllmctl} status lists what there is")
    return name


def as_dict(paths: Paths, name: str) -> dict[str, Any]:
    chosen = model_file.read(paths, name)
    loaded = layers.load(paths, name, {}, {}, model_wish.tuning_for)
    request = request_from(loaded.config.model, paths.models)
    origins = [loaded.origins.get(f"model.{key}", BUILT_IN) for key in ("path", "id", "name")]
    return {
        "schema": 1,
        "instance": name,
        "choice": chosen.choice or None,
        "preset": chosen.choice if chosen.is_preset else None,
        "tier": chosen.tier or None,
        "flags": list(redact_argv(chosen.flags)),
        "cleared": chosen.is_cleared,
        "edited_by_hand": chosen.is_edited,
        "file": str(model_file.path(paths, name)) if chosen.exists else None,
        "model": (request.path or request.identity) if request.selected else None,
        "model_from": next((str(origin) for origin in origins if origin != BUILT_IN), None) if request.selected else None,
        "gpus": list(loaded.config.gpus) if isinstance(loaded.config.gpus, tuple) else loaded.config.gpus,
        "tensor_parallel_size": getattr(loaded.config.tuning, "tensor_parallel_size", None),
        "max_model_len": getattr(loaded.config.tuning, "max_model_len", None),
        "served_model_name": (loaded.config.serve.served_model_name or request.name) if request.selected else None,
    }


def _lines(document: Mapping[str, Any], paths: Paths) -> Iterator[str]:
    name = document["instance"]
    if not document["model"]:
        last = f" (the last choice was {document['choice']})" if document["choice"] else ""
        yield f"{name}: No model selected. Run: {paths.vllmctl} model set {name} {document['choice'] or 'PRESET|MODEL'}{last}"
        return
    yield f"{name}: {document['model']}"
    gpus = ", ".join(document["gpus"]) if isinstance(document["gpus"], list) else document["gpus"]
    rows = (
        ("preset", f"{document['preset']} ({document['tier']})" if document["preset"] else ""),
        ("flags", shlex.join(document["flags"])),
        ("gpus", f"{gpus}, tensor parallel size {document['tensor_parallel_size']}"),
        ("context", f"{document['max_model_len']} tokens" if document["max_model_len"] else "the model's own"),
        ("served as", document["served_model_name"]),
        ("from", document["model_from"]),
        ("note", f"{document['file']} was changed by hand" if document["edited_by_hand"] and document["file"] else ""),
    )
    yield from (f"  {label:<10} {value}" for label, value in rows if value)


def clear(paths: Paths, given: str, *, restarts: bool, as_json: bool) -> int:
    """The drop-in says that there is no model, also where the instance's own file names one; the last choice stays known."""
    name = _existing(paths, given)
    before = model_file.read(paths, name)
    chosen = Chosen(before.choice, before.is_preset, before.tier, before.flags, before.gpus, is_cleared=True)
    text = model_file.rendered(name, chosen, _NO_MODEL, paths.vllmctl)
    refuse_overridden(paths, name, text)
    with model_file.alone(paths):
        notes = model_file.write(paths, name, text)
    if not as_json:
        sys.stdout.write(printable("\n".join([f"{name}: no model is selected", *(f"  note     {note}" for note in notes)]) + "\n"))
    was_restarted = restarts and model_set.restarted(paths, name, quiet=as_json, starts=False)
    if as_json:
        document = {"schema": 1, "instance": name, "file": str(model_file.path(paths, name)), "notes": notes, "restarted": was_restarted}
        sys.stdout.write(json.dumps(document) + "\n")
    return 0


def refuse_overridden(paths: Paths, name: str, text: str) -> None:
    """ConfigError where a later drop-in names a model."""
    with model_file.overlay(paths, name, text) as there:
        loaded = layers.load(there, name, {}, {}, model_wish.tuning_for)
    if request_from(loaded.config.model, paths.models).selected:
        places = [origin for key in ("path", "id", "name") if (origin := loaded.origins.get(f"model.{key}", BUILT_IN)) != BUILT_IN and not origin.place.endswith(model_file.DROP_IN)]
        where = str(places[-1]).replace(str(there.config), str(paths.config)) if places else "a later file"
        raise UsageError("choice_overridden", f"{where}: names a model after {model_file.DROP_IN}: clearing would have no effect", "remove `model:` there")
