"""`vllmctl model presets`: what this host has, which presets fit it and how, and why the others do not.

JSON, schema 1: {"schema": 1, "tier", "hardware": [...], "notes": [...], "stuck_in", "recommended", "chosen", "presets": [{"id", "title", "about", "fits",
"why", "model", "tier", "gpus", "gib", "min_gib", "max_model_len", "file"}], "errors": [{"preset", "what", "hint"}]}.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.core import preset_choice
from vllmd.core.preset_choice import Fit, Misfit
from vllmd.core.tiers import TIERS, Group
from vllmd.ctl import model_file, model_hardware
from vllmd.ctl import unit as units
from vllmd.ctl.model_file import Chosen
from vllmd.ctl.model_hardware import Equipment
from vllmd.ctl.model_wish import Wish, wish
from vllmd.errors import GpuUnavailable, VllmdError
from vllmd.models import presets as store
from vllmd.models.presets import Presets

NOTHING_FITS = 3


@dataclass(frozen=True, slots=True)
class View:
    """Everything that is shown."""

    equipment: Equipment
    groups: tuple[Group, ...]
    found: tuple[Fit | Misfit, ...]
    known: Presets
    instance: str
    chosen: Chosen

    @property
    def first(self) -> Fit | None:
        return preset_choice.recommended(self.found)


def presets(paths: Paths, name: str | None, *, as_json: bool) -> int:
    view = look(paths, units.instance_name(name) if name else "")
    if as_json:
        sys.stdout.write(json.dumps(as_dict(view)) + "\n")
    else:
        width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 160
        sys.stdout.write(printable("\n".join(lines(view, paths.vllmctl, width)) + "\n"))
        for error in view.known.bad.values():
            sys.stderr.write(printable(f"vllmctl: {error.what}\n  hint: {error.hint}\n"))
    if view.equipment.stuck_in:
        return int(GpuUnavailable.status)
    return 0 if view.first else NOTHING_FITS


def look(paths: Paths, instance: str) -> View:
    own, chosen = None, Chosen()
    if instance:
        chosen = model_file.read(paths, instance)
        own = wish(paths, instance) if paths.instance_config(instance).exists() else None
    return view(model_hardware.look(paths, instance), store.read(paths), own, instance, chosen)


def view(equipment: Equipment, known: Presets, own: Wish | None, instance: str = "", chosen: Chosen | None = None) -> View:
    groups = () if equipment.stuck_in else equipment.groups(own.only if own else None)
    found = tuple(preset_choice.judge(each, groups, own.count if own else None) for each in known.good)
    return View(equipment, groups, found, known, instance, chosen or Chosen())


def as_dict(view: View) -> dict[str, Any]:
    first = view.first
    return {
        "schema": 1,
        "tier": view.groups[0].tier if view.groups else None,
        "hardware": [str(group) for group in view.groups],
        "notes": list(view.equipment.notes),
        "stuck_in": view.equipment.stuck_in,
        "recommended": first.preset.id if first else None,
        "chosen": view.chosen.choice or None,
        "presets": [_row(each) for each in view.found],
        "errors": [{"preset": name, **_error(error)} for name, error in view.known.bad.items()],
    }


def _error(error: VllmdError) -> dict[str, str]:
    return {"what": error.what, "hint": error.hint}


def _row(each: Fit | Misfit) -> dict[str, Any]:
    preset = each.preset
    row: dict[str, Any] = {"id": preset.id, "title": preset.title, "about": preset.about, "file": preset.where}
    if isinstance(each, Misfit):
        return {**row, "fits": False, "why": each.why, "model": None, "tier": None, "gpus": None, "gib": None, "min_gib": None, "max_model_len": None}
    return {
        **row, "fits": True, "why": "", "model": each.variant.model, "tier": each.group.tier, "gpus": each.count if each.group.kind != "cpu" else 0,
        "gib": each.gib, "min_gib": each.variant.min_gib, "max_model_len": each.context,
    }  # fmt: skip


def lines(view: View, vllmctl: str, width: int) -> Iterator[str]:
    yield from _hardware(view)
    fits = [each for each in view.found if isinstance(each, Fit)]
    if fits:
        yield from _table(fits, view)
    misfits = [each for each in view.found if isinstance(each, Misfit)]
    if misfits and view.groups:
        yield ""
        yield "Does not fit:"
        wide = max(len(each.preset.id) for each in misfits)
        for each in misfits:
            yield from textwrap.wrap(each.why, max(width, 40), initial_indent=f"  {each.preset.id:<{wide}}  ", subsequent_indent=" " * (wide + 4))
    yield ""
    name = view.instance or "NAME"
    if view.first:
        yield f"* the first that fits: {vllmctl} model set {name} {view.first.preset.id}"
    else:
        yield f"No preset fits; any other model: {vllmctl} model set {name} ORG/NAME"


def _hardware(view: View) -> Iterator[str]:
    if view.equipment.stuck_in:
        yield f"the GPU driver does not answer (stuck in {view.equipment.stuck_in}): `journalctl -k -g NVRM`; it mostly needs a reboot"
    for group in view.groups:
        yield f"{group}: {group.tier} ({TIERS[group.tier]})"
    if not view.groups and not view.equipment.stuck_in:
        yield "no GPU of this host can be used"
    yield from (f"  {note}" for note in view.equipment.notes)
    if view.instance and view.chosen.choice:
        yield f"{view.instance} has {view.chosen.choice}" + (", cleared since" if view.chosen.is_cleared else "")


def _table(fits: Sequence[Fit], view: View) -> Iterator[str]:
    mixed = len(view.groups) > 1
    rows = [("", "PRESET", "ON" if mixed else "GPUS", "CONTEXT", "MODEL")]
    for each in fits:
        mark = "*" if each is view.first else " "
        on = "cpu" if each.group.kind == "cpu" else f"{each.count} x {each.group.name}" if mixed else str(each.count)
        rows.append((mark, each.preset.id, on, str(each.context or "its own"), each.variant.model))
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    yield ""
    for row in rows:
        yield "  ".join((*(text.ljust(size) for text, size in zip(row, wide, strict=False)), row[4])).rstrip()
