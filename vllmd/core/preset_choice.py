"""Which preset fits these GPUs, on how many of them and with which context; and why another one does not. Pure.

Of all ways that fit, those on GPUs that nobody has now go first; of these, the one with the longest context; then the one with
the fewest GPUs, so that others stay free for other models; then the newest GPUs, then the smallest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllmd.core.tiers import CPU, Capability, Group

SIZES = (1, 2, 4, 8)
"""How many GPUs a layer is divided among, unless the preset says otherwise: heads and groups of weights are powers of two."""
UNIFIED_SHARE = 0.85
"""Of memory that the GPU shares with the host, the host needs some too."""
UNLIMITED = 1 << 40


@dataclass(frozen=True, slots=True)
class Draft:
    """A small model that proposes tokens (speculative decoding). It has to be in the store: the engine is offline."""

    model: str
    method: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Variant:
    """A preset on one tier. `context`: (GiB, tokens) in growing order; the largest step that the memory reaches is taken; none: the
    model's own. `sizes`: numbers of GPUs that it can be divided among. `templates`: chat templates, the first that is found."""

    model: str
    min_gib: int
    revision: str = ""
    context: tuple[tuple[int, int], ...] = ()
    sizes: tuple[int, ...] = SIZES
    min_capability: Capability = (0, 0)
    serve: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = ()
    draft: Draft | None = None

    def tokens(self, gib: int) -> int | None:
        return max((length for at, length in self.context if at <= gib), default=None)


@dataclass(frozen=True, slots=True)
class Preset:
    """`where` is its file."""

    id: str
    title: str
    about: str
    order: int
    variants: Mapping[str, Variant]
    where: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """`count` GPUs of `group`, `gib` of memory together, requests of `context` tokens (None: the model's own limit)."""

    preset: Preset
    variant: Variant
    group: Group
    count: int
    gib: int
    context: int | None

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.group.tokens[: self.count]

    @property
    def rank(self) -> tuple[Any, ...]:
        return (self.group.free >= self.count, self.context or UNLIMITED, -self.count, self.group.capability, -self.group.each_mib)


@dataclass(frozen=True, slots=True)
class Misfit:
    """`why` completes "it does not fit: "."""

    preset: Preset
    why: str


def judge(preset: Preset, groups: Sequence[Group], wanted: int | None = None) -> Fit | Misfit:
    """`wanted`: exactly that many GPUs."""
    fits = [fit for fit in _ways(preset, groups, wanted) if fit.gib >= fit.variant.min_gib]
    if fits:
        return max(fits, key=lambda fit: fit.rank)
    return Misfit(preset, _why_not(preset, groups, wanted))


def anyway(preset: Preset, groups: Sequence[Group], wanted: int | None = None) -> Fit | None:
    """The nearest to a fit, for somebody who knows better: the most memory, the shortest context. None without a form for this tier."""
    ways = list(_ways(preset, groups, wanted))
    if not ways:
        return None
    nearest = max(ways, key=lambda fit: fit.gib - fit.variant.min_gib)
    shortest = nearest.context or next((length for _at, length in nearest.variant.context), None)
    return Fit(preset, nearest.variant, nearest.group, nearest.count, nearest.gib, shortest)


def recommended(found: Iterable[Fit | Misfit]) -> Fit | None:
    """The first that fits: presets are in the order in which their makers would offer them."""
    return next((each for each in found if isinstance(each, Fit)), None)


def _ways(preset: Preset, groups: Sequence[Group], wanted: int | None) -> Iterator[Fit]:
    for group in groups:
        variant = preset.variants.get(group.tier)
        if variant is None or _is_too_old(variant, group):
            continue
        for count in variant.sizes:
            if count <= group.largest and wanted in (None, count):
                gib = group.gib(count)
                yield Fit(preset, variant, group, count, gib, variant.tokens(gib))


def _is_too_old(variant: Variant, group: Group) -> bool:
    return group.capability != (0, 0) and group.capability < variant.min_capability


def _why_not(preset: Preset, groups: Sequence[Group], wanted: int | None) -> str:
    here = [(group, preset.variants[group.tier]) for group in groups if group.tier in preset.variants]
    if not groups:
        return "no GPU of this host can be used"
    if not here:
        return f"No configuration for {preset.id} on {' or '.join(dict.fromkeys(group.tier for group in groups))} hardware"
    ways = list(_ways(preset, groups, wanted))
    if ways:
        return _too_small(max(ways, key=lambda fit: (fit.gib - fit.variant.min_gib, fit.count)), groups)
    young = [(group, variant) for group, variant in here if not _is_too_old(variant, group)]
    if not young:
        group, variant = here[0]
        return f"it needs compute capability {_dotted(variant.min_capability)}, and {group.name} has {_dotted(group.capability)}"
    return _wrong_count(*max(young, key=lambda each: each[0].largest), wanted)


def _wrong_count(group: Group, variant: Variant, wanted: int | None) -> str:
    if wanted is None:
        return f"it needs {_listed(variant.sizes)} GPUs, and there {'is none' if group.kind == 'cpu' else 'is 1' if group.largest == 1 else f'are {group.largest} alike'}"
    if group.kind == "cpu":
        return f"{wanted} GPU{'' if wanted == 1 else 's'} {'is' if wanted == 1 else 'are'} wanted, and there is none"
    if wanted > group.largest:
        alone = "; a model is on one MIG device at most" if group.kind == "mig" else ""
        return f"{wanted} GPUs are wanted, and there {'is 1' if group.count == 1 else f'are {group.count} alike'}{alone}"
    return f"it can be divided among {_listed(variant.sizes)} GPUs, not among {wanted}"


def _too_small(fit: Fit, groups: Sequence[Group]) -> str:
    """`fit` has the most of what is there."""
    need = f"it needs {fit.variant.min_gib} GiB"
    group = fit.group
    if group.tier == CPU:
        return f"{need} of memory, and this host has {fit.gib} GiB"
    if group.kind == "mig":
        return f"{need}, and a MIG device has {group.gib(1)} GiB; MIG devices cannot be joined"
    has = f"{fit.count} x {group.name} {'has' if fit.count == 1 else 'have'} {fit.gib} GiB"
    unequal = "; GPUs that differ cannot be joined" if len([each for each in groups if each.kind == "gpu"]) > 1 else ""
    return f"{need}, and {has}{unequal}"


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def _listed(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"


# -- what becomes of a choice


@dataclass(frozen=True, slots=True)
class Found:
    """What was looked up for a choice: the path of the chat template and of the draft model, '' where there is none."""

    template: str = ""
    draft: str = ""


def settings(fit: Fit, found: Found, *, is_only_group: bool, names_gpus: bool) -> dict[str, Any]:
    """The drop-in's content. A number of GPUs lets each start take those that are healthy and free; they are named where a number
    could mean others: among different GPUs, for MIG devices, or where the instance's own file names its GPUs."""
    variant, group = fit.variant, fit.group
    model: dict[str, Any] = {"id": variant.model} | ({"revision": variant.revision} if variant.revision else {})
    serve: dict[str, Any] = {"tensor_parallel_size": fit.count, **variant.serve}
    if fit.context is not None:
        serve["max_model_len"] = fit.context
    if group.is_unified:
        serve["gpu_memory_utilization"] = min(UNIFIED_SHARE, float(serve.get("gpu_memory_utilization", 1)))
    args = dict(variant.args)
    if found.template:
        args["chat-template"] = found.template
    if found.draft and variant.draft:
        args["speculative-config"] = {"method": variant.draft.method, "model": found.draft, "num_speculative_tokens": variant.draft.tokens}
    engine = {name: value for name, value in (("args", args), ("env", dict(variant.env))) if value}
    return {"model": model, **gpus_of(fit.group, fit.count, is_only_group=is_only_group, names_gpus=names_gpus), "serve": serve} | ({"engine": engine} if engine else {})


def gpus_of(group: Group, count: int, *, is_only_group: bool, names_gpus: bool) -> dict[str, Any]:
    if group.kind == "cpu":
        return {}
    if group.kind == "gpu" and is_only_group and not names_gpus:
        return {"gpus": count}
    return {"gpus": list(group.tokens[:count])}
