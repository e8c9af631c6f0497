"""What this host has for a model: GPUs as the driver shows them, who has which, and the host's own memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllmd.config.paths import Paths
from vllmd.core import tiers
from vllmd.core.tiers import Card, Group, Part
from vllmd.ctl import gpu_facts
from vllmd.ctl.gpu_facts import Host, Seen
from vllmd.errors import GpuUnavailable
from vllmd.gpu import leases
from vllmd.gpu.leases import Holder
from vllmd.system.hardware import Hardware
from vllmd.system.hardware import look as look_at_bus

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Equipment:
    """`notes`: what a person should know of it, a line each."""

    cards: tuple[Card, ...]
    host_mib: int
    notes: tuple[str, ...] = ()
    stuck_in: str = ""

    def groups(self, only: tuple[str, ...] | None = None) -> tuple[Group, ...]:
        return tiers.groups(self.cards, self.host_mib, only)


def look(paths: Paths, instance: str = "") -> Equipment:
    """Blocks for the driver's 45 s at most. What `instance` itself has counts as free."""
    host = gpu_facts.look(paths)
    cards = tuple(card(each, host.source, leases.holders(paths), instance) for each in host.gpus if each.index >= 0)
    return Equipment(cards, host_memory_mib(), tuple(_notes(host, cards, look_at_bus())), host.stuck_in)


def need_driver(equipment: Equipment) -> None:
    """GpuUnavailable where nobody can say what is there."""
    if equipment.stuck_in:
        what = f"the GPU driver does not answer (stuck in {equipment.stuck_in})"
        raise GpuUnavailable("driver_stuck", what, "`journalctl -k -g NVRM` says why; it mostly needs a reboot")


def card(seen: Seen, source: str, held: Mapping[str, tuple[Holder, ...]], instance: str) -> Card:
    parts = tuple(Part(uuid, mib, _held_by(held.get(uuid, ()), instance)) for uuid, mib in zip(seen.slices, seen.slice_mib, strict=False))
    return Card(
        index=seen.index,
        uuid=seen.uuid,
        name=seen.name,
        vendor="amd" if source == "sysfs" else "nvidia",
        capability=seen.capability,
        architecture=seen.architecture,
        memory_mib=seen.total_mib,
        unusable=_unusable(seen),
        held_by=_held_by(held.get(seen.uuid, ()), instance),
        parts=parts,
    )


def _unusable(seen: Seen) -> str:
    if seen.lost:
        return seen.lost.replace("_", " ")
    if seen.quarantine is not None:
        return f"quarantined: {seen.quarantine.what}"
    return "" if seen.is_usable else seen.verdict or seen.verdict_class


def _held_by(holders: tuple[Holder, ...], instance: str) -> str:
    named = [each.instance or each.unit or f"pid {each.pid}" for each in holders if not instance or each.instance != instance]
    return ", ".join(dict.fromkeys(named))


def _notes(host: Host, cards: tuple[Card, ...], bus: Hardware) -> Iterator[str]:
    for each in cards:
        if each.unusable:
            yield f"{each} cannot be used: {each.unusable} (vllmctl gpu)"
        elif each.held_by:
            yield f"{each} is held by {each.held_by}"
        for part in each.parts:
            if part.held_by:
                yield f"MIG device {part.uuid[:12]} of {each} is held by {part.held_by}"
        if each.memory_mib is None and not each.parts and not each.unusable:
            yield f"{each} shares the host's memory: what the host itself needs is taken from the same"
    if not cards and not host.stuck_in and any(gpu.vendor == "nvidia" for gpu in bus.gpus):
        yield f"an NVIDIA card is there, and no driver answers: {host.note or 'is it installed?'} (nvidia-smi)"
    if not cards and not host.stuck_in and any(gpu.vendor == "amd" for gpu in bus.gpus):
        yield "an AMD card is there without memory of its own, or without its driver amdgpu: nothing is planned for it"


def host_memory_mib(path: Path | None = None) -> int:
    """0 where the kernel does not say."""
    try:
        words = dict(line.partition(":")[::2] for line in (path or MEMINFO).read_text(encoding="ascii", errors="replace").splitlines())
    except OSError:
        return 0
    number = words.get("MemTotal", "").split()[:1]
    return int(number[0]) // 1024 if number and number[0].isdecimal() else 0
