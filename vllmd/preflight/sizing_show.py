"""Pure: what was estimated, for people and for programs (docs/sizing.md has the schema)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllmd.core.sizing_verdict import Device, Verdict, gib, smallest_gpu
from vllmd.preflight.sizing import Sized

_MARKS = {"fits": "fits", "too_long": "does not fit", "too_large": "does not fit", "busy": "does not fit now", "unknown": "not compared"}


def as_dict(sized: Sized) -> dict[str, Any]:
    needs, verdict, model = sized.estimate, sized.verdict, sized.model
    return {
        "verdict": verdict.word,
        "what": verdict.what,
        "advice": list(verdict.advice),
        "weights_bytes": needs.weights,
        "kv_cache_bytes": needs.kv,
        "kv_bytes_per_token": needs.per_token,
        "overhead_bytes": needs.overhead,
        "needed_bytes": needs.needed,
        "budget_bytes": verdict.budget,
        "room_tokens": verdict.room,
        "max_model_len": needs.length,
        "dtype": needs.dtype,
        "gpu_memory_utilization": needs.wanted.fraction,
        "tensor_parallel_size": needs.wanted.tensor_parallel,
        "pipeline_parallel_size": needs.wanted.pipeline_parallel,
        "exact": needs.is_exact,
        "device": _device(sized.device, sized.gpus),
        "model": {
            "architecture": model.name,
            "family": model.family,
            "layers": len(model.layers),
            "attention_heads": model.heads,
            "context": model.context,
            "dtype": model.dtype,
            "quantization": model.quantization,
            "tied_embeddings": model.is_tied,
        },
        "source": {"origin": sized.facts.origin, "revision": sized.facts.revision, "file_bytes": sized.facts.file_bytes, "read_bytes": sized.facts.read_bytes},
        "notes": list(sized.notes),
    }


def _device(device: Device | None, gpus: int) -> dict[str, Any] | None:
    if device is None:
        return None
    return {"name": device.name, "count": gpus, "total_bytes": device.total, "free_bytes": None if device.free < 0 else device.free, "is_cpu": device.is_cpu}


def rows(sized: Sized) -> Iterator[tuple[str, str]]:
    """The table: what, and how much."""
    needs, verdict = sized.estimate, sized.verdict
    each = "" if needs.wanted.is_cpu else f" on each of {needs.wanted.gpus} GPUs" if needs.wanted.gpus > 1 else ""
    yield "weights", f"{gib(needs.weights)}{each}{'' if needs.is_exact else ' (from the sizes of its files)'}"
    yield "KV cache", f"{gib(needs.kv)} for one request of {needs.length} tokens{_per_token(sized)}"
    yield "besides", f"{gib(needs.overhead)} ({'libraries, activations' if needs.wanted.is_cpu else 'driver, activations, graphs'}: a rough figure)"
    yield "needed", gib(needs.needed)
    if sized.device is not None:
        yield "there is", _there(sized.device, verdict, sized)
    elif not needs.wanted.is_cpu and (size := smallest_gpu(needs)):
        yield "there is", f"not known; a GPU of {size} GiB would do"


def _per_token(sized: Sized) -> str:
    return f" ({sized.estimate.per_token / 1024:.4g} KiB a token)" if sized.estimate.per_token else ""


def _there(device: Device, verdict: Verdict, sized: Sized) -> str:
    free = f", {gib(device.free)} free" if device.free >= 0 else ""
    if device.is_cpu and sized.estimate.wanted.kv_bytes:
        return f"{gib(device.total)} on {device.name}{free}; {gib(sized.estimate.wanted.kv_bytes)} for the KV cache"
    return f"{gib(verdict.budget)}: {sized.estimate.wanted.fraction:g} of {device.name}, {gib(device.total)}{free}"


def verdict(sized: Sized) -> Iterator[str]:
    """The sentence at the end, and what to do."""
    found = sized.verdict
    if found.word == "fits":
        length = sized.estimate.length
        times = f": {found.room / length:.1f} requests of {length} tokens at once" if length and found.room else ""
        yield f"{found.what}; the KV cache has room for {found.room} tokens{times}" if found.room else found.what
        return
    yield found.what if found.word == "unknown" else f"{_MARKS[found.word]}: {found.what}"
    for line in found.advice:
        yield f"- {line}"
    if found.word.startswith("too") and not found.advice:
        yield "- take a smaller model, or larger GPUs"
