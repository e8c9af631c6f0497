"""What of an instance's settings decides how much memory vLLM will want: core/sizing's question, from a Context."""

from __future__ import annotations

from vllmd.core.sizing import GIB, Wanted
from vllmd.engines import vllm_check
from vllmd.engines.protocol import Context

_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"


def wanted(context: Context, fraction: float) -> Wanted:
    """Flags in engine.args and in the configuration file's place count as settings do; what makes no sense counts as not given."""
    tuning, given = context.config.tuning, vllm_check.arguments(context)
    is_cpu = context.installed.variant == "cpu"
    quantization = str(given.get("quantization") or "")
    return Wanted(
        tensor_parallel=tuning.tensor_parallel_size,
        pipeline_parallel=tuning.pipeline_parallel_size,
        max_model_len=tuning.max_model_len or _count(given.get("max-model-len")),
        dtype=str(given.get("dtype") or ""),
        kv_dtype=tuning.kv_cache_dtype or str(given.get("kv-cache-dtype") or ""),
        online=quantization if quantization in ("fp8", "bitsandbytes") else "",
        fraction=fraction,
        batched_tokens=tuning.max_num_batched_tokens or _count(given.get("max-num-batched-tokens")),
        requests=_count(given.get("max-num-seqs")),
        is_eager=given.get("enforce-eager") not in (None, False),
        is_cpu=is_cpu,
        block=_count(given.get("block-size")),
        kv_bytes=_kv_bytes(context, given.get("kv-cache-memory-bytes")) if is_cpu else 0,
    )


def _kv_bytes(context: Context, flag: object) -> int:
    """The variable wins over the flag, and counts GiB."""
    said = context.config.engine.env.get(_KV_SPACE) or ""
    return int(said) * GIB if said.isascii() and said.isdigit() and len(said) < 7 else _count(flag)


_UNITS = {"k": 1000, "m": 10**6, "g": 10**9, "K": 1024, "M": 1 << 20, "G": 1 << 30}


def _count(value: object) -> int:
    """Also as vLLM writes it for people: 32k, 1M. 0 for anything else (auto, -1)."""
    text = str(value or "").strip()
    unit = _UNITS.get(text[-1:], 1)
    number = text[:-1] if unit > 1 else text
    try:
        found = float(number) * unit
    except ValueError:
        return 0
    return int(found) if 0 < found < 1 << 62 else 0
