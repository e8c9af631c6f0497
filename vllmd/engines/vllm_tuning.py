"""vLLM's own settings that have a name of their own, written under `serve:` beside those of every engine.

Each is passed only when it is set, because vLLM's own default is the better one for a machine that we do not know;
tensor and pipeline sizes always stand on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllmd.config import parsers as p
from vllmd.config import values
from vllmd.config.settings import setting


@values.parser(
    "true, false, or empty for the engine's default",
    enum=[True, False, "true", "false", "yes", "no", "1", "0", 0, 1, ""],
)
def tri_state(value: object) -> bool | None:
    return None if value == "" else bool(p.boolean(value))


@values.parser(
    "a positive whole number; empty for the engine's default",
    anyOf=[{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9]*$"}],
)
def optional_count(value: object) -> int | None:
    return None if value == "" else int(p.integer(low=1)(value))


@values.parser(
    "a number above 0 and at most 1; empty for the engine's default",
    anyOf=[{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "string"}],
)
def optional_share(value: object) -> float | None:
    return None if value == "" else float(p.number(above=0, high=1)(value))


@values.parser("one word; empty for the engine's default", type="string", pattern="^[^\\s-]?[^\\s]*$")
def optional_word(value: object) -> str:
    found = str(p.one_line(value))
    if found.startswith("-") or len(found.split()) > 1 or found != found.strip():
        raise ValueError(f"must be one word, not {values.shown(found)}")
    return found


@dataclass(frozen=True, slots=True)
class Tuning:
    """None, or '' for a word, means: not passed."""

    tensor_parallel_size: int = setting(
        1, p.integer(low=1), "VLLM_TENSOR_PARALLEL_SIZE", "Number of GPUs that share each layer."
    )
    pipeline_parallel_size: int = setting(
        1, p.integer(low=1), "VLLM_PIPELINE_PARALLEL_SIZE", "Number of groups of GPUs that share the layers."
    )
    data_parallel_size: int = setting(
        1, p.integer(low=1), "VLLMD_DATA_PARALLEL_SIZE", "Number of replicas of the model inside the engine."
    )
    prefix_caching: bool | None = setting(
        None, tri_state, "VLLM_PREFIX_CACHING", "Keep the KV cache of common prefixes; empty: the engine decides."
    )
    kv_cache_dtype: str = setting("", optional_word, "VLLM_KV_CACHE_DTYPE", "Type of the KV cache (auto, fp8, ...).")
    max_model_len: int | None = setting(
        None, optional_count, "VLLM_MAX_MODEL_LEN", "Longest context of a request, prompt and answer.", unit="tokens"
    )
    max_num_batched_tokens: int | None = setting(
        None, optional_count, "VLLM_MAX_NUM_BATCHED_TOKENS", "Most tokens in one step of the engine.", unit="tokens"
    )
    max_tokens: int | None = setting(
        None, optional_count, "VLLM_MAX_TOKENS", "Cap on the tokens of every answer, for all clients.", unit="tokens"
    )
    gpu_memory_utilization: float | None = setting(
        None, optional_share, "VLLMD_GPU_MEMORY_UTILIZATION", "Share of each GPU's memory that the engine takes."
    )
