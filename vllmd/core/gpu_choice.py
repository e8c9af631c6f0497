"""Which GPUs an instance gets, and whether they have the memory that it will ask for. Pure: facts in, a choice or a refusal out.

`all` and a list mean what they say: one GPU of them that cannot be used refuses the start. A number means any that are
healthy and free: of one model where there are enough of it, the least used first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

Wanted = str | int | tuple[str, ...]
SLACK_MIB = 256
"""Memory that may differ without anybody's being to blame: the driver's own, a display's."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process that has memory of a GPU. `name` is '' and `unit` '' where they cannot be seen."""

    pid: int
    used_mib: int | None = None
    name: str = ""
    unit: str = ""

    def __str__(self) -> str:
        who = ", ".join(filter(None, (f"pid {self.pid}", self.unit)))
        used = f" with {self.used_mib} MiB" if self.used_mib else ""
        return f"{self.name or 'a process'} ({who}){used}"


@dataclass(frozen=True, slots=True)
class Slice:
    """A MIG device of a GPU."""

    uuid: str
    memory_total_mib: int | None = None
    memory_free_mib: int | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as the driver shows it now. `lost`: 'lost', 'reset_required', 'reboot_required', or '' (usable)."""

    index: int
    uuid: str = ""
    name: str = ""
    memory_total_mib: int | None = None
    memory_free_mib: int | None = None
    utilization_pct: int | None = None
    lost: str = ""
    processes: tuple[Process, ...] = ()
    slices: tuple[Slice, ...] = ()

    @property
    def used_mib(self) -> int | None:
        if self.memory_total_mib is None or self.memory_free_mib is None:
            return None
        return self.memory_total_mib - self.memory_free_mib

    def __str__(self) -> str:
        return f"GPU {self.index} {self.name}".rstrip() + (f" ({self.uuid[:12]})" if self.uuid else "")


@dataclass(frozen=True, slots=True)
class Banned:
    """Why a GPU is quarantined, as the record says: `what` in a sentence's middle, and what lifts it."""

    what: str
    hint: str


@dataclass(frozen=True, slots=True)
class Rules:
    """What bears on the choice. `needed_mib`: of a GPU with this total (0: no gate). `leased`: UUID -> who has it, of those
    that we cannot have as well."""

    needed_mib: Callable[[int], int] = lambda _total: 0
    quarantined: Mapping[str, Banned] = field(default_factory=dict)
    leased: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """`whole` GPUs in the order that the engine shall see them, and MIG devices with the GPUs that they lie on."""

    whole: tuple[Device, ...] = ()
    slices: tuple[tuple[Slice, Device], ...] = ()
    tokens: tuple[str, ...] = ()
    """For CUDA_VISIBLE_DEVICES."""

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple({each.index: each for each in (*self.whole, *(parent for _, parent in self.slices))}.values())


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not. `may_pass`: somebody else has it now, so that waiting can help (75); else a person must act (69)."""

    code: str
    what: str
    hint: str
    may_pass: bool = False


def choose(devices: Sequence[Device], wanted: Wanted, rules: Rules, visible: str | None = None) -> Choice | Refusal:
    """`visible` is the CUDA_VISIBLE_DEVICES that the supervisor itself was given (None: not set): `all` and a number choose
    among those."""
    if wanted in ("none", 0, ()):
        return Choice()
    if isinstance(wanted, int):
        return _count(_visible(devices, visible), wanted, rules)
    if isinstance(wanted, str):
        if visible is None:
            return _usable(Choice(whole=tuple(devices)), rules)
        wanted = tuple(token for token in _tokens(visible) if _find(devices, token))
    chosen = _listed(devices, wanted)
    return chosen if isinstance(chosen, Refusal) else _usable(chosen, rules)


def _tokens(text: str) -> list[str]:
    return [token for each in text.split(",") if (token := each.strip())]


def _visible(devices: Sequence[Device], visible: str | None) -> list[Device]:
    if visible is None:
        return list(devices)
    return [found for token in _tokens(visible) if isinstance(found := _find(devices, token), Device)]


def _find(devices: Iterable[Device], token: str) -> Device | tuple[Slice, Device] | None:
    """By index, or by the beginning of a UUID, as CUDA does."""
    for device in devices:
        if (token.isascii() and token.isdigit() and device.index == int(token)) or (token.startswith("GPU") and device.uuid.startswith(token)):
            return device
        for part in device.slices:
            if token.startswith("MIG") and part.uuid.startswith(token):
                return part, device
    return None


def _listed(devices: Sequence[Device], tokens: tuple[str, ...]) -> Choice | Refusal:
    found = {token: _find(devices, token) for token in tokens}
    missing = [token for token, each in found.items() if each is None]
    if missing:
        there = ", ".join(f"{each} {each.uuid}" for each in devices) or "none"
        return Refusal("gpu_missing", f"there is no GPU {', '.join(missing)}", f"The GPUs of this host: {there}. Correct `gpus:`.")
    parts = [each for each in found.values() if isinstance(each, tuple)]
    whole = [each for each in found.values() if isinstance(each, Device)]
    named = tuple(each.uuid or token if isinstance(each, Device) else each[0].uuid for token, each in found.items() if each)
    return Choice(tuple(dict.fromkeys(whole)), tuple(dict.fromkeys(parts)), tuple(dict.fromkeys(named)))


def _usable(choice: Choice, rules: Rules) -> Choice | Refusal:
    for device in choice.devices:
        refusal = _unusable(device, rules)
        if refusal:
            return refusal
    return choice


def _unusable(device: Device, rules: Rules) -> Refusal | None:
    if device.lost:
        return Refusal("gpu_lost", f"{device}: the driver says {device.lost.replace('_', ' ')}", _LOST_HINTS.get(device.lost, _LOST_HINTS["lost"]))
    banned = rules.quarantined.get(device.uuid)
    if banned:
        return Refusal("gpu_quarantined", f"{device} is quarantined: {banned.what}", banned.hint)
    return None


_LOST_HINTS = {
    "lost": "`journalctl -k -g NVRM` says why; the host must be rebooted.",
    "reset_required": "Stop what uses it and reset it (`nvidia-smi --gpu-reset -i INDEX`), or reboot the host.",
    "reboot_required": "The host must be rebooted.",
}


def _count(devices: Sequence[Device], count: int, rules: Rules) -> Choice | Refusal:
    healthy = [each for each in devices if _unusable(each, rules) is None]
    if len(healthy) < count:
        return _too_few(devices, count, rules)
    free = [each for each in healthy if not _busy(each, rules)]
    if len(free) < count:
        why = "; ".join(_busy(each, rules) for each in healthy if _busy(each, rules))
        what = f"{_gpus(count)} {'is' if count == 1 else 'are'} wanted, and {len(free)} of {len(healthy)} healthy ones {'is' if len(free) == 1 else 'are'} free: {why}"
        return Refusal("gpu_busy", what, "`vllmctl gpu` shows who has which; stop one, or want fewer.", may_pass=True)
    picked = sorted(_best(free, count), key=lambda each: each.index)
    return Choice(whole=tuple(picked), tokens=tuple(each.uuid or str(each.index) for each in picked))


def _too_few(devices: Sequence[Device], count: int, rules: Rules) -> Refusal:
    sick = [refusal for each in devices if (refusal := _unusable(each, rules))]
    what = f"{_gpus(count)} {'is' if count == 1 else 'are'} wanted, and there {'is' if len(devices) == 1 else 'are'} {len(devices)}"
    if not sick:
        return Refusal("gpu_missing", what, "Correct `gpus:`; `vllmctl gpu` shows what there is.")
    reasons = "; ".join(each.what for each in sick)
    return Refusal(sick[0].code, f"{what}, of which {len(devices) - len(sick)} can be used: {reasons}", sick[0].hint)


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def _busy(device: Device, rules: Rules) -> str:
    """Why a healthy GPU is not free; '' when it is."""
    if device.slices:
        return f"{device} is divided into MIG devices, which are named one by one"
    return (f"{device} has {holder}" if (holder := rules.leased.get(device.uuid, "")) else "") or shortage(device, rules)


def _best(free: Sequence[Device], count: int) -> list[Device]:
    """Of one model where there are enough of it; the least used group, and in it the least used GPUs."""
    groups: dict[tuple[str, int | None], list[Device]] = {}
    for each in sorted(free, key=_use):
        groups.setdefault((each.name, each.memory_total_mib), []).append(each)
    enough = [group[:count] for group in groups.values() if len(group) >= count]
    if not enough:
        return sorted(free, key=_use)[:count]
    return min(enough, key=lambda group: [_use(each) for each in group])


def _use(device: Device) -> tuple[int, int, int]:
    return (device.used_mib or 0, device.utilization_pct or 0, device.index)


# -- memory


def shortage(device: Device, rules: Rules) -> str:
    """What is wrong with its free memory, with those who have it; '' where it is enough, or nobody can say (unified memory)."""
    total, free = device.memory_total_mib, device.memory_free_mib
    if total is None or free is None or free >= rules.needed_mib(total):
        return ""
    owners = " and ".join(map(str, device.processes)) or "no process that can be seen (it may just be given back)"
    return f"{device} has {free} of {total} MiB free, {rules.needed_mib(total)} MiB needed; in use by {owners}"


def shortages(choice: Choice, now: Sequence[Device], rules: Rules, count: int = 0) -> str:
    """Of all that were chosen, as they are now; '' when the engine will find what it asks for. `count`: how many of them it
    uses (0: all); it takes the first."""
    known = {each.index: each for each in now}
    found = [shortage(known.get(each.index, each), rules) for each in choice.whole[: count or None]]
    parts = {part.uuid: (part, each) for each in now for part in each.slices}
    for part, parent in (parts.get(each.uuid, (each, parent)) for each, parent in choice.slices):
        as_device = replace(parent, uuid=part.uuid, memory_total_mib=part.memory_total_mib, memory_free_mib=part.memory_free_mib)
        found.append(shortage(as_device, rules))
    return "; ".join(filter(None, found))


def not_returned(before: Sequence[Device], now: Sequence[Device]) -> str:
    """What of the memory did not come back, and who has it; '' when it is as before, or when others have taken it since. A
    GPU that is lost gives nothing back, and says nothing."""
    baseline = {each.uuid or str(each.index): each for each in before}
    found = []
    for device in now:
        was = baseline.get(device.uuid or str(device.index))
        if was is None or device.lost or device.used_mib is None or was.used_mib is None:
            continue
        excess = device.used_mib - was.used_mib
        if excess > SLACK_MIB and excess - _taken_by_others(was, device) > SLACK_MIB:
            owners = " and ".join(map(str, device.processes)) or "no process that can be seen"
            found.append(f"{device} has {excess} MiB less free than before the start; in use by {owners}")
    return "; ".join(found)


def _taken_by_others(was: Device, now: Device) -> int:
    """What processes of other units have taken meanwhile. One without a unit may be a stray of ours: it explains nothing."""
    had = {each.pid: each.used_mib or 0 for each in was.processes}
    return sum(max(0, (each.used_mib or 0) - had.get(each.pid, 0)) for each in now.processes if each.unit or each.pid in had)
