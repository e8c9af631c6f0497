"""`vllmctl model set`: decides, checks what would be in force, writes the drop-in, and restarts the instance where it runs.

JSON, schema 1: {"schema": 1, "instance", "choice", "preset", "model", "tier", "gpus", "hardware", "max_model_len", "file", "notes": [...],
"restarted"}.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllmd import configured, stages
from vllmd.config import layers
from vllmd.config.given import BUILT_IN
from vllmd.config.layers import Loaded
from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.ctl import files, model_choice, model_file, model_wish
from vllmd.ctl import unit as units
from vllmd.ctl.model_choice import Asked, Selection
from vllmd.errors import ConfigError, UsageError, VllmdError

__all__ = ["Asked", "set_model"]
_FIRST_PORT = 8000


def set_model(paths: Paths, name: str, asked: Asked, *, restarts: bool, as_json: bool) -> int:
    """0 when it is in force, or will be at the next start. VllmdError: nothing was changed, or the restart failed."""
    name = units.instance_name(name)
    instance_text = "" if paths.instance_config(name).exists() else _new_instance(paths, name, asked)
    before = model_file.read(paths, name)
    selection = model_choice.select(paths, name, asked, before, model_wish.wish(paths, name, instance_text))
    text = model_file.rendered(name, selection.chosen, selection.settings, paths.vllmctl)
    told = list(selection.told)
    if not selection.chosen.is_preset and not asked.is_forced:
        from vllmd.ctl import model_fit

        told += model_fit.notes(paths, name, text, instance_text, selection.group)
    with model_file.alone(paths):
        instance_text = "" if paths.instance_config(name).exists() else _new_instance(paths, name, asked)  # the port that was free before may be gone
        notes = [*told, *checked(paths, name, text, instance_text, selection.settings, selection.chosen.tier)]
        notes += model_file.write(paths, name, text, instance_text)
    document = as_dict(paths, name, selection, notes)
    if not as_json:
        sys.stdout.write(printable("\n".join(_lines(document, selection)) + "\n"))
    document["restarted"] = restarts and restarted(paths, name, quiet=as_json)
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
    return 0


def as_dict(paths: Paths, name: str, selection: Selection, notes: list[str]) -> dict[str, Any]:
    return {
        "schema": 1,
        "instance": name,
        "choice": selection.chosen.choice,
        "preset": selection.chosen.choice if selection.chosen.is_preset else None,
        "model": selection.model,
        "tier": selection.chosen.tier or None,
        "gpus": selection.settings.get("gpus"),
        "hardware": str(selection.group) if selection.group else None,
        "max_model_len": selection.context,
        "file": str(model_file.path(paths, name)),
        "notes": notes,
        "restarted": False,
    }


def _lines(document: Mapping[str, Any], selection: Selection) -> Iterator[str]:
    yield f"{document['instance']}: {document['choice']}" + (f", {document['model']}" if document["model"] != document["choice"] else "")
    group = selection.group
    if group is not None and group.kind != "cpu":
        yield f"  gpus     {selection.count} of {group} ({group.tier})"
    if selection.context:
        yield f"  context  {selection.context} tokens"
    yield f"  file     {document['file']}"
    for note in document["notes"]:
        yield f"  note     {note}"


# -- an instance that is new


def _new_instance(paths: Paths, name: str, asked: Asked) -> str:
    """The file of an instance that has none. UsageError where another one was probably meant."""
    there = layers.instance_names(paths)
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.75)
    if near and not asked.is_new:
        raise UsageError("instance_unknown", f"there is no instance {name} ({paths.instance_config(name)})", f"did you mean {near[0]}? to make {name}, say --new")
    return (
        f"# Made by `{paths.vllmctl} model set {name}`; vllmd.yaml(5) lists what may stand here. The model is chosen in {name}.d/{model_file.DROP_IN}.\n"
        f"serve:\n  port: {_free_port(paths, there)}\n"
    )


def _free_port(paths: Paths, names: list[str]) -> int:
    """The first that no instance of this host has in its configuration."""
    taken = set()
    for each in names:
        try:
            taken.add(layers.load(paths, each, {}, {}, model_wish.tuning_for).config.serve.port)
        except VllmdError:
            continue  # what cannot be read is for its own instance to say
    return next(port for port in range(_FIRST_PORT, 1 << 16) if port not in taken)


# -- what would be in force


def checked(paths: Paths, name: str, text: str, instance_text: str, settings: Mapping[str, Any], tier: str = "") -> list[str]:
    """What a person should know of it. VllmdError where a start would refuse it, or where it would have no effect."""
    with model_file.overlay(paths, name, text, instance_text) as there:
        prepared = configured.prepare(name, there, {name: os.environ[name] for name in ("PATH",) if name in os.environ})
        ours = str(there.config / f"{name}.d" / model_file.DROP_IN)
        told = list(_others(prepared.loaded, ours, settings))
        try:
            where = stages.context(prepared)
            stages.plan(prepared, where)
            told += _other_build(where.installed.variant, tier)
        except ConfigError as error:
            if error.code != "engine_missing":
                raise
            told.append("no engine is installed yet: vllmctl engine install")
        return [each.replace(str(there.config), str(paths.config)) for each in told]


def _others(loaded: Loaded, ours: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Values of other files that stand beside the choice, or before it. ConfigError where the model itself is not ours."""
    for key in _keys(settings):
        origin = loaded.origins.get(key, BUILT_IN)
        if origin == BUILT_IN or origin.place == ours:
            continue
        if key.startswith("model."):
            hint = f"remove that file: rm {origin.place}" if origin.place.endswith("zz-rollback.yaml") else "remove `model:` there, or choose the model there"
            raise ConfigError("choice_overridden", f"{origin}: sets the model, after {Path(ours).name}: a choice would have no effect", hint)
        yield f"{key} is what {origin} says"
    for key, origin in loaded.origins.items():
        if key.startswith(("engine.args.", "engine.env.")) and origin.kind == "file" and origin.place != ours and Path(origin.place).stem != "vllmd":
            yield f"{key} of {origin} stays in force"


def _other_build(variant: str, tier: str) -> list[str]:
    """An engine that was built for something else would not see these GPUs."""
    wanted = "rocm" if tier.startswith("amd") else "cuda" if tier.startswith("nvidia") else ""
    if not wanted or not variant or variant == wanted:
        return []
    return [f"the engine that it would run is a build for {variant}: vllmctl engine install --{wanted}"]


def _keys(settings: Mapping[str, Any]) -> Iterator[str]:
    for section, value in settings.items():
        if not isinstance(value, Mapping):
            yield section
            continue
        for key, item in value.items():
            if section == "engine" and isinstance(item, Mapping):
                yield from (f"engine.{key}.{each}" for each in item)
            else:
                yield f"{section}.{key}"


# -- afterwards


def restarted(paths: Paths, name: str, *, quiet: bool = False, starts: bool = True) -> bool:
    """Whether it was; says what to do where it was not. VllmdError of the start, with the way back."""
    said = (lambda _line: None) if quiet else (lambda line: sys.stdout.write(f"{line}\n"))
    if paths.scope == "root" or not units.runs(paths.scope):
        runs = files.text(files.status(paths, name), "state") not in ("", "stopped", "failed")
        if runs:
            said(f"{name} is run by hand: end it and run it again to let this take effect")
        elif starts:
            said(f"start it: vllmd{paths.vllmctl.removeprefix('vllmctl')} run {name}")
        return False
    from vllmd.ctl import follow

    active = units.Systemd(paths.scope).show(name).active
    if active not in ("active", "activating", "reloading"):
        if starts:
            said(f"start it: {paths.vllmctl} start {name}")
        return False
    sys.stdout.flush()
    try:
        if quiet:
            units.Systemd(paths.scope).submit("restart", name)
        else:
            follow.bring_up(paths, "restart", name, wait=True, timeout_s=None)
    except VllmdError as error:
        error.hint = f"{error.hint}; the configuration that was ready before: {paths.vllmctl} rollback {name}"
        raise
    return True
