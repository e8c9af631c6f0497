"""What a host has to compute with, and which tier of the presets that is. Pure: facts in, groups of equal GPUs out.

A tier says which form of a model's weights a GPU runs well: NVFP4, FP8, 4-bit weights with bfloat16, or those without it.
Tensor parallelism divides a layer evenly, so only equal GPUs are ever counted together; a MIG device is always alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

BLACKWELL, HOPPER, OLDER, LEGACY = "nvidia-blackwell", "nvidia-hopper", "nvidia-older", "nvidia-legacy"
AMD, AMD_OLDER, CPU = "amd", "amd-older", "cpu"

TIERS: Mapping[str, str] = {
    BLACKWELL: "NVIDIA, compute capability 10.0 and newer: B200, B300, GB10 (DGX Spark), RTX 50",
    HOPPER: "NVIDIA, compute capability 9.0: H100, H200, GH200",
    OLDER: "NVIDIA, compute capability 8.0 to 8.9: A100, L40S, RTX 30 and 40",
    LEGACY: "NVIDIA before compute capability 8.0: T4, RTX 20, V100",
    AMD: "AMD Instinct MI300 and newer (gfx942, gfx950)",
    AMD_OLDER: "other AMD GPUs that compute",
    CPU: "no GPU",
}
"""Each tier, and what is in it."""
_AMD_NEW = ("gfx942", "gfx950")
_CAPABILITY = re.compile(r"([0-9]{1,3})\.([0-9]{1,2})")
_OLDEST_KNOWN = (8, 0)
Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """A MIG device. `memory_mib` None: the driver does not say."""

    uuid: str
    memory_mib: int | None = None
    held_by: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU as the driver shows it. `capability` is NVIDIA's ('9.0'), `architecture` AMD's ('gfx942'); `unusable`: why nobody may
    use it; `held_by`: the instance that has it now. `memory_mib` None on a GPU that answers: it shares the host's memory."""

    index: int
    uuid: str = ""
    name: str = ""
    vendor: str = "nvidia"
    capability: str = ""
    architecture: str = ""
    memory_mib: int | None = None
    unusable: str = ""
    held_by: str = ""
    parts: tuple[Part, ...] = ()

    def __str__(self) -> str:
        return f"GPU {self.index} {self.name}".rstrip()


@dataclass(frozen=True, slots=True)
class Group:
    """GPUs that are alike, or MIG devices, or the host itself (`kind` gpu, mig, cpu). `tokens` are their UUIDs, those first that
    nobody holds; `free` is the number of those."""

    tier: str
    name: str
    kind: str
    count: int
    each_mib: int
    capability: Capability = (0, 0)
    is_unified: bool = False
    tokens: tuple[str, ...] = ()
    free: int = 0

    @property
    def largest(self) -> int:
        """How many of them one model can be divided among."""
        return self.count if self.kind == "gpu" else 1

    def gib(self, count: int) -> int:
        return self.each_mib * count // 1024

    def __str__(self) -> str:
        return self.shown()

    def shown(self) -> str:
        if self.kind == "cpu":
            return f"no GPU, {self.gib(1)} GiB of memory"
        what = "MIG device of " if self.kind == "mig" else ""
        share = " shared with the host" if self.is_unified else " each" if self.count > 1 else ""
        return f"{self.count} x {what}{self.name or 'GPU'}, {self.gib(1)} GiB{share}"


def tier_of(card: Card) -> str:
    if card.vendor == "amd":
        return AMD if card.architecture in _AMD_NEW else AMD_OLDER
    major = numbers(card.capability)[0]
    if major >= 10:
        return BLACKWELL
    if major == 9:
        return HOPPER
    return LEGACY if 0 < major < 8 else OLDER


def numbers(capability: str) -> Capability:
    """(9, 0) for '9.0'; (0, 0) where it is not known."""
    found = _CAPABILITY.fullmatch(capability)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def groups(cards: Iterable[Card], host_mib: int, only: tuple[str, ...] | None = None) -> tuple[Group, ...]:
    """The largest first; without any GPU the host itself. `only`: the indices, UUIDs and MIG ids that may be used."""
    cards = tuple(cards)
    alike: dict[tuple[object, ...], list[tuple[str, str]]] = {}
    made: dict[tuple[object, ...], Group] = {}
    for card in cards:
        for kind, token, mib, held_by in _units(card):
            if card.unusable or not _is_wanted(card, token, kind, only):
                continue
            is_unified = kind == "gpu" and mib is None
            each = host_mib if mib is None else mib
            key = (tier_of(card), card.name, kind, each, card.capability)
            made[key] = Group(tier_of(card), card.name, kind, 0, each, numbers(card.capability), is_unified)
            alike.setdefault(key, []).append((held_by, token))
    found = [_complete(group, alike[key]) for key, group in made.items()]
    if not cards or only == ():
        return (Group(CPU, "", "cpu", 1, host_mib, free=1),)
    return tuple(sorted(found, key=lambda group: (group.largest * group.each_mib, group.capability), reverse=True))


def _complete(group: Group, members: list[tuple[str, str]]) -> Group:
    ordered = [token for held_by, token in members if not held_by] + [token for held_by, token in members if held_by]
    free = sum(not held_by for held_by, _token in members)
    return Group(group.tier, group.name, group.kind, len(members), group.each_mib, group.capability, group.is_unified, tuple(ordered), free)


def _units(card: Card) -> list[tuple[str, str, int | None, str]]:
    """(kind, token, MiB, holder). A GPU that is divided is not there as a whole; a part whose size is unknown is of no use."""
    if card.parts:
        return [("mig", part.uuid, part.memory_mib, part.held_by) for part in card.parts if part.memory_mib]
    return [("gpu", card.uuid or str(card.index), card.memory_mib, card.held_by)]


def _is_wanted(card: Card, token: str, kind: str, only: tuple[str, ...] | None) -> bool:
    if only is None:
        return True
    return any(token.startswith(each) if each.startswith(("GPU", "MIG")) else kind == "gpu" and each == str(card.index) for each in only)
