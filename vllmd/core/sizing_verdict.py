"""Pure: does it fit, and if not, which setting to change to what. Advice is tried before it is given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from vllmd.core.architecture import Architecture
from vllmd.core.sizing import GIB, Estimate, Wanted, estimate
from vllmd.core.weights import Weights

Word = Literal["fits", "too_long", "too_large", "busy", "unknown"]
_PARALLEL = (1, 2, 4, 8, 16, 32)
_SHORTEST = 2048
"""A context that is worth serving."""
_ROUND = 256
_VARIANTS = ((8, "an FP8 variant"), (4.5, "a 4-bit variant (AWQ, GPTQ, NVFP4)"))
"""Bits of an element, with the scales."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where it is to run: a GPU (the smallest of those that are used), or the host's memory. `free` -1: not known."""

    name: str
    total: int
    free: int = -1
    is_cpu: bool = False


class Verdict(NamedTuple):
    """`budget`: bytes of the device that the engine takes. `room`: tokens that the cache will hold in all. `advice`: each line one way."""

    word: Word
    what: str
    budget: int = 0
    room: int = 0
    advice: tuple[str, ...] = ()


class Case(NamedTuple):
    """What was estimated, from what; `weigh` makes the weights anew for another dtype or parallelism."""

    model: Architecture
    weights: Weights
    wanted: Wanted
    dtype: str = ""

    def again(self, **changes: object) -> Estimate:
        return estimate(self.model, self.weights, replace(self.wanted, **changes), self.dtype)  # type: ignore[arg-type]  # names are checked by replace


def judge(case: Case, found: Estimate, device: Device | None, gpus: int = 0) -> Verdict:
    """`gpus`: how many like this one there are (0: not known)."""
    if device is None or not device.total:
        return Verdict("unknown", f"needs {gib(found.needed)} on each GPU" if not found.wanted.is_cpu else f"needs {gib(found.needed)}")
    budget = budget_of(found, device)
    room = found.cache.tokens(max(budget - found.fixed, 0), found.length)
    heads = _divides(case, found.wanted.tensor_parallel)
    if not heads:
        what = f"{case.model.heads} attention heads cannot be shared out among {found.wanted.tensor_parallel} GPUs"
        return Verdict("too_large", what, budget, room, tuple(_parallel(case, device, gpus)))
    if found.needed > budget:
        word: Word = "too_large" if found.fixed >= budget else "too_long"
        return Verdict(word, _lacking(found, device, budget), budget, room, tuple(_ways(case, found, device, budget, gpus)))
    if busy := _busy(found, device, budget):
        return Verdict("busy", busy, budget, room, tuple(_free(found, device)))
    return Verdict("fits", f"fits: {gib(found.needed)} of {gib(budget)}", budget, room)


def budget_of(found: Estimate, device: Device) -> int:
    """Of a GPU, its share; of a host whose cache has a size of its own, what is needed besides too."""
    if device.is_cpu and found.wanted.kv_bytes:
        return found.fixed + found.wanted.kv_bytes
    return int(device.total * found.wanted.fraction)


def _busy(found: Estimate, device: Device, budget: int) -> str:
    """The engine takes its whole share at once, whatever it needs of it."""
    if device.free < 0 or device.free >= budget:
        return ""
    if device.is_cpu and found.wanted.kv_bytes:
        return f"{gib(budget)} will be taken of the host's memory, and {gib(device.free)} are free now"
    if device.is_cpu:
        return f"vLLM does not start unless {gib(budget)} ({found.wanted.fraction:g} of {device.name}) are free, whatever it needs of that, and {gib(device.free)} are free now"
    return f"{device.name} has {gib(device.free)} free now, and the engine takes {gib(budget)} ({found.wanted.fraction:g} of {gib(device.total)})"


def _free(found: Estimate, device: Device) -> Iterator[str]:
    if device.is_cpu and found.wanted.kv_bytes:
        yield "free memory of the host (`vllmctl status` shows what instances have), or lower VLLM_CPU_KVCACHE_SPACE"
        return
    space = _space(found)
    if device.is_cpu and found.fixed + space * GIB <= device.free:
        yield f"set VLLM_CPU_KVCACHE_SPACE: {space} in engine.env (GiB): then it takes what it needs, about {gib(found.fixed + space * GIB)}"
    yield "free memory of the host" if device.is_cpu else "end what uses it: `vllmctl gpu` shows who has it"
    share = math.floor(device.free / device.total * 100 - 1) / 100
    if share > 0 and found.needed <= device.total * share:
        yield f"or set serve.gpu_memory_utilization: {share:g}"


def _space(found: Estimate) -> int:
    """GiB of KV cache that one request needs."""
    return max(1, math.ceil((found.kv + found.cache.page) / GIB))


def _lacking(found: Estimate, device: Device, budget: int) -> str:
    where = "the host's memory" if device.is_cpu else f"{device.name} with {gib(device.total)}"
    if device.is_cpu and found.wanted.kv_bytes:
        return f"one request of {found.length} tokens takes {gib(found.kv)} of KV cache, and VLLM_CPU_KVCACHE_SPACE gives it {gib(found.wanted.kv_bytes)}"
    share = f"{found.wanted.fraction:g} of {where}"
    if found.fixed >= budget:
        return f"the weights ({gib(found.weights)}) and what is needed besides ({gib(found.overhead)}) are more than {gib(budget)}, {share}"
    left = budget - found.fixed
    return f"one request of {found.length} tokens takes {gib(found.kv)} of KV cache, and {gib(left)} are left of {gib(budget)}, {share}"


def _ways(case: Case, found: Estimate, device: Device, budget: int, gpus: int) -> Iterator[str]:
    left = budget - found.fixed
    longest = _rounded(found.cache.longest(left, found.length)) if left > 0 else 0
    if longest >= _SHORTEST or (longest and found.length < _SHORTEST):
        yield f"set serve.max_model_len: {longest}"
    if device.is_cpu and found.wanted.kv_bytes:
        yield f"or set VLLM_CPU_KVCACHE_SPACE: {_space(found)} in engine.env (GiB), if the host has it"
        return
    yield from _smaller_cache(case, budget)
    if not device.is_cpu:
        yield from _larger_share(found, device)
        yield from _parallel(case, device, gpus)
    yield from _variants(case, found, device, budget)


def _smaller_cache(case: Case, budget: int) -> Iterator[str]:
    if case.wanted.is_cpu or case.wanted.kv_dtype not in ("", "auto") or case.model.is_kv_fp8:
        return
    small = case.again(kv_dtype="fp8")
    if small.needed <= budget:
        yield "set serve.kv_cache_dtype: fp8 (half the KV cache; from compute capability 8.9)"


def _larger_share(found: Estimate, device: Device) -> Iterator[str]:
    if found.wanted.fraction < 0.95 and found.needed <= device.total * 0.95:
        share = math.ceil(found.needed / device.total * 100) / 100
        yield f"set serve.gpu_memory_utilization: {share:g}, if nothing else uses the GPU"


def _parallel(case: Case, device: Device, gpus: int) -> Iterator[str]:
    """The smallest number of GPUs of this size with which it fits."""
    if device.is_cpu:
        return
    for count in _PARALLEL:
        if count <= case.wanted.tensor_parallel or not _divides(case, count):
            continue
        wide = case.again(tensor_parallel=count)
        if wide.needed <= budget_of(wide, device):
            total = wide.wanted.gpus
            there = f"; this host has {gpus}" if 0 < gpus < total else ""
            yield f"set serve.tensor_parallel_size: {count} ({gib(wide.needed)} on each of {total} GPUs{there})"
            return


def _variants(case: Case, found: Estimate, device: Device, budget: int) -> Iterator[str]:
    """Only of models that are not quantised yet."""
    if case.model.quantization or case.wanted.online or not case.weights.linear:
        return
    for bits, name in _VARIANTS:
        part = found.weights * case.weights.linear / max(case.weights.total, 1)
        weights = math.ceil(found.weights - part + part * bits / (8 * _bytes(found)))
        smaller = found._replace(weights=weights)
        length = _rounded(smaller.cache.longest(budget - smaller.fixed, found.length)) if budget > smaller.fixed else 0
        if smaller.needed <= budget:
            yield f"take {name} of the model (about {gib(weights)} of weights on each {'host' if device.is_cpu else 'GPU'})"
            return
        if length >= max(_SHORTEST, found.length // 8):
            yield f"take {name} of the model (about {gib(weights)} of weights) with serve.max_model_len: {length}"
            return


def _bytes(found: Estimate) -> int:
    return 4 if found.dtype in ("float32", "float") else 2


def _divides(case: Case, count: int) -> bool:
    return not case.model.heads or case.model.heads % count == 0


def _rounded(length: int) -> int:
    return length // _ROUND * _ROUND if length > 2 * _ROUND else length


def smallest_gpu(found: Estimate, sizes: Sequence[int] = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 180, 192, 288)) -> int:
    """GiB of the smallest usual GPU on which it fits; 0 for none."""
    return next((size for size in sizes if found.needed <= size * GIB * found.wanted.fraction), 0)


def gib(count: float) -> str:
    """As people read it: 14.96 GiB; small ones in MiB or KiB."""
    if count < 1 << 20:
        return f"{count / 1024:.0f} KiB"
    if count < GIB:
        return f"{count / (1 << 20):.1f} MiB" if count < 100 << 20 else f"{count / (1 << 20):.0f} MiB"
    return f"{count / GIB:.2f} GiB" if count < 100 * GIB else f"{count / GIB:.0f} GiB"


