"""Which facts of a GPU warn, and which refuse the start. Pure: facts and limits in, words out.

Only what a user put into `gpu_fail_on` refuses, besides a device that is lost: a start that fails on a warm card at
three in the morning is worse than a slow one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vllmd.preflight.report import Gpu

Wanted = str | int | tuple[str, ...]
Memory = Literal["free", "total"]
"""Which memory the gate looks at: 'total' while what holds the port may still hold the GPU's memory too."""
_IDLE = 0x1
"""The clock reason that every idle GPU shows."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`min_free_mib` None is 'auto': memory_fraction of each GPU's total (0: the engine does not say, no gate)."""

    warn_pct: float = 50.0
    fail_on: frozenset[str] = frozenset()
    min_free_mib: int | None = None
    memory_fraction: float = 0.0
    max_temp_c: float = 85.0
    max_util_pct: float = 95.0

    def needed_mib(self, gpu: Gpu) -> int:
        if self.min_free_mib is not None:
            return self.min_free_mib
        return int(self.memory_fraction * (gpu.memory_total_mib or 0))


@dataclass(frozen=True, slots=True)
class Checked:
    """The GPUs that count, each with its warnings; `failures` refuse the start."""

    gpus: tuple[Gpu, ...]
    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def check(gpus: Iterable[Gpu], wanted: Wanted, limits: Limits, memory: Memory = "free") -> Checked:
    """All that is wrong with the GPUs that are wanted. With a number, that many must be without failure."""
    chosen, missing = select(tuple(gpus), wanted)
    failing = {gpu.index: failures_of(gpu, limits, memory) for gpu in chosen}
    failures = [text for texts in failing.values() for text in texts]
    judged = tuple(replace(gpu, warnings=(*gpu.warnings, *warnings_of(gpu, limits))) for gpu in chosen)
    if isinstance(wanted, int) and sum(not texts for texts in failing.values()) >= wanted:
        return Checked(judged, warnings=tuple(failures))
    return Checked(judged, failures=(*missing, *failures))


def select(gpus: Sequence[Gpu], wanted: Wanted) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The GPUs that the instance may use, and what is missing. Tokens are indices or (the beginnings of) UUIDs; a MIG
    device's GPU is not known here, so that such a token takes all."""
    if isinstance(wanted, int):
        short = () if len(gpus) >= wanted else (f"{wanted} GPUs are wanted, and there are {len(gpus)}",)
        return tuple(gpus), short
    if isinstance(wanted, str) or any(token.startswith("MIG") for token in wanted):
        return tuple(gpus), ()
    absent = tuple(f"there is no GPU {token}" for token in wanted if not any(_is(gpu, token) for gpu in gpus))
    return tuple(gpu for gpu in gpus if any(_is(gpu, token) for token in wanted)), absent


def _is(gpu: Gpu, token: str) -> bool:
    return gpu.index == int(token) if token.isdigit() else bool(token) and gpu.uuid.startswith(token)


def failures_of(gpu: Gpu, limits: Limits, memory: Memory = "free") -> list[str]:
    if gpu.lost:
        return [f"{_named(gpu)}: the driver says {gpu.lost.replace('_', ' ')}"]
    found = []
    if "temperature" in limits.fail_on:
        found += _above(gpu, "temperature", gpu.temperature_c, limits.max_temp_c, "°C")
    if "utilization" in limits.fail_on:
        found += _above(gpu, "utilization", gpu.utilization_pct, limits.max_util_pct, "%")
    if "memory" in limits.fail_on:
        found += _memory_failure(gpu, limits, memory)
    return found


def _above(gpu: Gpu, what: str, value: int | None, limit: float, unit: str) -> list[str]:
    if value is None:
        return [f"{_named(gpu)} does not say its {what}, which gpu_fail_on names"]
    return [f"{_named(gpu)}: {what} {value} {unit} is above {limit:g} {unit}"] if value > limit else []


def _memory_failure(gpu: Gpu, limits: Limits, memory: Memory) -> list[str]:
    value = gpu.memory_free_mib if memory == "free" else gpu.memory_total_mib
    needed = limits.needed_mib(gpu)
    if value is None:  # unified memory (GB10) has no figure; only a number that somebody wrote down insists on one
        return [f"{_named(gpu)} does not say its memory, which gpu_fail_on names"] if limits.min_free_mib else []
    return [f"{_named(gpu)}: {value} MiB {_WORD[memory]}, {needed} MiB needed"] if value < needed else []


_WORD = {"free": "free", "total": "in all"}


def warnings_of(gpu: Gpu, limits: Limits) -> list[str]:
    """What a person should know although the start goes on. Thresholds that refuse are not said twice."""
    found = []
    used = _used_pct(gpu)
    if used is not None and used > limits.warn_pct:
        found.append(f"{used:.0f} % of its memory is in use (more than {limits.warn_pct:g} %)")
    if "temperature" not in limits.fail_on and gpu.temperature_c is not None and gpu.temperature_c > limits.max_temp_c:
        found.append(f"temperature {gpu.temperature_c} °C is above {limits.max_temp_c:g} °C")
    if "utilization" not in limits.fail_on and gpu.utilization_pct is not None and gpu.utilization_pct > limits.max_util_pct:
        found.append(f"utilization {gpu.utilization_pct} % is above {limits.max_util_pct:g} %")
    if "memory" not in limits.fail_on and gpu.memory_free_mib is not None and gpu.memory_free_mib < limits.needed_mib(gpu):
        found.append(f"{gpu.memory_free_mib} MiB free, and the engine will ask for {limits.needed_mib(gpu)} MiB")
    if _reasons(gpu) & ~_IDLE:
        found.append(f"its clocks are held down (reasons {gpu.clocks_event_reasons_active})")
    return found


def _used_pct(gpu: Gpu) -> float | None:
    if not gpu.memory_total_mib or gpu.memory_free_mib is None:
        return None
    return 100.0 * (gpu.memory_total_mib - gpu.memory_free_mib) / gpu.memory_total_mib


def _reasons(gpu: Gpu) -> int:
    try:
        return int(gpu.clocks_event_reasons_active or "0", 16)
    except ValueError:
        return 0


def _named(gpu: Gpu) -> str:
    return f"GPU {gpu.index} {gpu.name}".rstrip()
