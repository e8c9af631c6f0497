"""What was asked for, made into a selection: a preset as it fits these GPUs, or any model with what can be said of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllmd.config.paths import Paths
from vllmd.core import preset_choice
from vllmd.core.preset_choice import UNIFIED_SHARE, Fit, Misfit, Preset
from vllmd.core.tiers import Group
from vllmd.ctl import model_flags, model_hardware, model_places
from vllmd.ctl.model_file import Chosen
from vllmd.ctl.model_hardware import Equipment
from vllmd.ctl.model_wish import Wish
from vllmd.errors import ConfigError, UsageError
from vllmd.models import presets
from vllmd.models.presets import Presets


@dataclass(frozen=True, slots=True)
class Asked:
    """A command line of `model set`."""

    choice: str = ""
    flags: tuple[str, ...] = ()
    gpus: int | None = None
    is_forced: bool = False
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """`settings` are the drop-in's content, `chosen` what it remembers; `group` and `count` the GPUs (None: as the instance's own files
    say); `told` what a person should know."""

    chosen: Chosen
    settings: Mapping[str, Any]
    model: str
    group: Group | None
    count: int
    context: int | None
    told: tuple[str, ...] = ()


def select(paths: Paths, name: str, asked: Asked, before: Chosen, wish: Wish) -> Selection:
    """VllmdError: nothing that could be served."""
    asked = _completed(paths, name, asked, before)
    known = presets.read(paths)
    flags = model_flags.settings(asked.flags)
    equipment = model_hardware.look(paths, name)
    model_hardware.need_driver(equipment)
    if asked.choice in known.bad:
        raise known.bad[asked.choice]
    preset = known.get(asked.choice)
    if preset is not None:
        made = _preset(paths, preset, asked, wish, equipment)
    else:
        made = _model(_named(asked.choice, known, paths), asked, wish, equipment)
    settings = merged(made.settings, flags)
    context = settings.get("serve", {}).get("max_model_len")
    unseen = equipment.notes if not equipment.cards else ()
    secret = model_flags.secret(asked.flags)
    open_to_all = (f"{secret} is a secret, and stands in that file and on the engine's command line, where every user of this host may read it; a token for the hub: /etc/credstore/vllmd.hf-token",) if secret else ()
    return Selection(made.chosen, settings, made.model, made.group, made.count, context if isinstance(context, int) else None, (*made.told, *_busy(made), *unseen, *open_to_all))


def _completed(paths: Paths, name: str, asked: Asked, before: Chosen) -> Asked:
    """Without a choice, the last one again, with its flags, unless there are new ones."""
    if asked.choice:
        return asked
    if not before.choice:
        raise UsageError("no_choice", f"nothing was chosen for {name} yet", f"{paths.vllmctl} model presets {name} shows what fits; then: {paths.vllmctl} model set {name} PRESET")
    return Asked(before.choice, asked.flags or before.flags, asked.gpus if asked.gpus is not None else before.gpus, asked.is_forced, asked.is_new)


def groups_of(equipment: Equipment, wish: Wish) -> tuple[Group, ...]:
    return equipment.groups(wish.only)


def judged(preset: Preset, equipment: Equipment, wish: Wish, gpus: int | None) -> Fit | Misfit:
    """As the instance's own files allow; --gpus goes before the number that they say."""
    return preset_choice.judge(preset, groups_of(equipment, wish), gpus or wish.count)


def _preset(paths: Paths, preset: Preset, asked: Asked, wish: Wish, equipment: Equipment) -> Selection:
    fit: Fit | Misfit | None = judged(preset, equipment, wish, asked.gpus)
    told: list[str] = []
    if isinstance(fit, Misfit):
        why = fit.why
        if not asked.is_forced or (fit := preset_choice.anyway(preset, groups_of(equipment, wish), asked.gpus or wish.count)) is None:
            raise ConfigError("does_not_fit", f"{preset.id} does not fit: {why}", _instead(paths, equipment, wish, asked))
        told.append(f"it does not fit ({why}), and was forced")
    assert isinstance(fit, Fit)
    found, missing = model_places.found(paths, wish.loaded.config, fit.variant)
    groups = groups_of(equipment, wish)
    settings = preset_choice.settings(fit, found, is_only_group=len(groups) == 1, names_gpus=wish.only is not None)
    chosen = Chosen(preset.id, is_preset=True, tier=fit.group.tier, flags=asked.flags, gpus=asked.gpus)
    return Selection(chosen, settings, fit.variant.model, fit.group, fit.count, fit.context, (*told, *missing))


def _instead(paths: Paths, equipment: Equipment, wish: Wish, asked: Asked) -> str:
    first = preset_choice.recommended(judged(each, equipment, wish, asked.gpus) for each in presets.read(paths).good)
    other = f"{first.preset.id} fits; " if first else ""
    other += "--gpus N goes before what the instance's file says of GPUs; " if wish.count and asked.gpus is None else ""
    return f"{other}`{paths.vllmctl} model presets` shows all; a model of your own: ORG/NAME; although it does not fit: --force"


# -- any model


def _named(choice: str, known: Presets, paths: Paths) -> dict[str, str]:
    """The drop-in's `model:`. UsageError where it can be neither a preset nor a model."""
    if choice.startswith(("/", "./", "../", "~")):
        return {"path": model_places.absolute(choice)}
    model, _, revision = choice.partition("@")
    if model.count("/") == 1:
        return {"id": model} | ({"revision": revision} if revision else {})
    names = [preset.id for preset in known.good]
    near = difflib.get_close_matches(choice, names, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UsageError("preset_unknown", f"there is no preset {choice!r:.80}", f"{meant}{paths.vllmctl} model presets lists them; a model of the hub is ORG/NAME, a directory begins with /")


def _model(model: dict[str, str], asked: Asked, wish: Wish, equipment: Equipment) -> Selection:
    """What nobody has tried on this tier: on one GPU, unless somebody says otherwise."""
    chosen = Chosen(asked.choice, tier="", flags=asked.flags, gpus=asked.gpus)
    name = model.get("id") or model["path"]
    groups = [group for group in groups_of(equipment, wish) if group.kind != "cpu"]
    if not groups and asked.gpus:
        raise ConfigError("too_few_gpus", f"{asked.gpus} GPUs are wanted, and there is none that can be used", "vllmctl gpu shows what there is")
    if not groups:
        return Selection(chosen, {"model": model, **_one()}, name, None, 0, None)
    if asked.gpus is None and wish.speaks_of_gpus:
        return Selection(chosen, {"model": model}, name, None, 0, None, ("its GPUs are those that the instance's own files say",))
    count = asked.gpus or 1
    fitting = [group for group in groups if group.largest >= count]
    if not fitting:
        raise ConfigError("too_few_gpus", f"{count} GPUs are wanted, and there are {' and '.join(map(str, groups))}", "only GPUs that are alike can share a model; --gpus N says how many")
    group = max(fitting, key=lambda each: (each.free >= count, each.each_mib, each.capability))
    serve: dict[str, Any] = {"tensor_parallel_size": count} | ({"gpu_memory_utilization": UNIFIED_SHARE} if group.is_unified else {})
    gpus = preset_choice.gpus_of(group, count, is_only_group=len(groups) == 1, names_gpus=wish.only is not None)
    more = max(each.largest for each in groups) > count and asked.gpus is None
    told = (f"on one of {group.count} GPUs: --gpus N divides it among N",) if more else ()
    return Selection(replace_tier(chosen, group), {"model": model, **gpus, "serve": serve}, name, group, count, None, told)


def _one() -> dict[str, Any]:
    return {"serve": {"tensor_parallel_size": 1}}


def replace_tier(chosen: Chosen, group: Group) -> Chosen:
    return Chosen(chosen.choice, chosen.is_preset, group.tier, chosen.flags, chosen.gpus)


def _busy(made: Selection) -> Sequence[str]:
    if made.group is None or made.group.kind == "cpu" or made.group.free >= made.count:
        return ()
    free = made.group.free
    return (f"it takes {made.count} of {made.group.count}, and {'none is' if not free else f'only {free} is' if free == 1 else f'only {free} are'} free now: stop what has the others, or --gpus N",)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings of settings name by name, two levels and engine.args; a flag's own JSON is replaced whole."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) and key in ("serve", "engine", "args") else value
    return both
