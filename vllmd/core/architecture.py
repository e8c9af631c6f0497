"""Pure: from a model's config.json to what its memory depends on: the layers, and what each keeps of a token.

The file is hostile input, and every family writes it in its own way; what is not understood becomes a note, never an error. Where
both say it, the shape of a tensor is believed before the file (`corrected`): Gemma 3's says nothing of its heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

Kind = Literal["full", "window", "chunk", "mla", "state", "none"]
MAX_LAYERS = 10_000
_MOST = 1 << 40
SIZES = {"float32": 4, "float": 4, "float64": 8, "float16": 2, "half": 2, "bfloat16": 2}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 6,
                    "max_position_embeddings": 131072, "vocab_size": 262208},
    "gemma2": {"head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma": {"head_dim": 256},
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "llama4_text": {"attention_chunk_size": 8192, "no_rope_layer_interval": 4},
    "qwen3_next": {"full_attention_interval": 4},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128, "sliding_window_pattern": 2},
}  # fmt: skip
"""What the class of a family takes where its config.json is silent, as far as it decides about memory."""
_TIED = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text", "cohere", "cohere2", "gpt2", "whisper"})
_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "distilbert", "camembert", "deberta-v2", "new", "gte"})
"""They keep nothing of a token."""
_LINEAR = frozenset({"linear_attention", "mamba", "conv", "short_conv", "recurrent"})


class Layer(NamedTuple):
    """What one layer keeps. Of a token: keys and values of `heads` heads (`mla`: one latent vector, whatever the parallelism);
    `span` is the window or chunk beyond which nothing is kept. `state`: elements that are kept of a whole request."""

    kind: Kind
    heads: int = 0
    size: int = 0
    """Of keys and values together, per head."""
    span: int = 0
    state: int = 0


@dataclass(frozen=True, slots=True)
class Architecture:
    """`dtype` is '' where config.json does not say it; `context` 0. `notes`: what was guessed, for people."""

    name: str
    family: str
    layers: tuple[Layer, ...]
    heads: int
    hidden: int
    inner: int
    vocab: int
    context: int
    dtype: str
    is_tied: bool
    quantization: str = ""
    is_kv_fp8: bool = False
    notes: tuple[str, ...] = ()

    @property
    def is_mla(self) -> bool:
        return any(layer.kind == "mla" for layer in self.layers)


def parse(config: Mapping[str, Any]) -> Architecture:
    """Never raises for what a file can hold."""
    words = _text(config)
    family = str(words.get("model_type") or config.get("model_type") or "")[:64]
    words = {**_DEFAULTS.get(family, {}), **words}
    heads = _first(words, "num_attention_heads", "n_head", "decoder_attention_heads", "n_heads")
    hidden = _first(words, "hidden_size", "n_embd", "d_model")
    count = min(_first(words, "num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers"), MAX_LAYERS)
    notes = [] if count else ["config.json does not say how many layers there are: the KV cache is not counted"]
    names = config.get("architectures")
    quantization = _mapping(config.get("quantization_config")) or _mapping(words.get("quantization_config"))
    return Architecture(
        name=str(names[0])[:64] if isinstance(names, list) and names else "",
        family=family,
        layers=_layers(words, family, count, heads, hidden),
        heads=heads,
        hidden=hidden,
        inner=_inner(words),
        vocab=_first(words, "vocab_size") or _first(config, "vocab_size"),
        context=_context(words),
        dtype=_dtype(words) or _dtype(config),
        is_tied=bool(config.get("tie_word_embeddings", words.get("tie_word_embeddings", family in _TIED))),
        quantization=str(quantization.get("quant_method") or quantization.get("quant_algo") or "")[:64],
        is_kv_fp8=bool(quantization.get("kv_cache_scheme")) or "fp8" in str(quantization.get("kv_cache_quant_algo", "")).lower(),
        notes=tuple(notes),
    )


def corrected(found: Architecture, key_rows: int) -> Architecture:
    """With the rows that a key projection really has (0: not known): heads x size, where config.json says it otherwise or not at all."""
    full = next((layer for layer in found.layers if layer.kind == "full"), None) or next((layer for layer in found.layers if layer.kind in ("window", "chunk")), None)
    if not key_rows or full is None or not full.heads or full.heads * full.size == 2 * key_rows or key_rows % full.heads:
        return found
    if len({(layer.heads, layer.size) for layer in found.layers if layer.kind in ("full", "window", "chunk")}) > 1:
        return found  # two kinds of heads on purpose
    size = 2 * key_rows // full.heads
    layers = tuple(layer._replace(size=size) if layer.kind in ("full", "window", "chunk") else layer for layer in found.layers)
    return replace(found, layers=layers, notes=(*found.notes, f"its tensors have heads of {size // 2}, and config.json says otherwise"))


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a model that also sees or hears, the part that generates."""
    for key in ("text_config", "language_config", "llm_config", "thinker_config"):
        if inner := _mapping(config.get(key)):
            return _text(inner)
    return config


def _layers(words: Mapping[str, Any], family: str, count: int, heads: int, hidden: int) -> tuple[Layer, ...]:
    if family in _ENCODERS:
        return (Layer("none"),) * count
    if (rank := _number(words.get("kv_lora_rank"))) and (_number(words.get("qk_rope_head_dim"))):
        return (Layer("mla", 1, rank + _number(words.get("qk_rope_head_dim"))),) * count
    own = _attention(words, heads, hidden)
    wide = Layer("full", _number(words.get("num_global_key_value_heads")) or own.heads, 2 * _number(words.get("global_head_dim")) or own.size)
    shared = max(0, count - _number(words.get("num_kv_shared_layers"))) if _number(words.get("num_kv_shared_layers")) else count
    state = Layer("state", state=_state(words))
    made = {"full": wide, "window": own._replace(kind="window", span=_number(words.get("sliding_window"))),
            "chunk": own._replace(kind="chunk", span=_number(words.get("attention_chunk_size"))), "state": state, "none": Layer("none")}  # fmt: skip
    return tuple(made[kind] if index < shared else made["none"] for index, kind in enumerate(_kinds(words, count)))


def _attention(words: Mapping[str, Any], heads: int, hidden: int) -> Layer:
    groups = _first(words, "n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups") or heads
    if words.get("multi_query") is True and not words.get("new_decoder_architecture"):
        groups = 1
    size = _first(words, "head_dim", "hidden_size_per_head", "kv_channels", "attention_head_dim") or (hidden // heads if heads else 0)
    return Layer("full", groups, size + (_number(words.get("v_head_dim")) or size))


def _kinds(words: Mapping[str, Any], count: int) -> Sequence[str]:
    """What each layer is."""
    window = _number(words.get("sliding_window")) if words.get("use_sliding_window") is not False else 0
    chunk = _number(words.get("attention_chunk_size"))
    listed = words.get("layer_types")
    if isinstance(listed, list) and len(listed) >= count:
        return [_kind(str(each), has_window=bool(window), has_chunk=bool(chunk)) for each in listed[:count]]
    if isinstance(pattern := words.get("hybrid_override_pattern"), str) and len(pattern) >= count:
        return [{"M": "state", "*": "full"}.get(letter, "none") for letter in pattern[:count]]
    if every := _number(words.get("full_attention_interval")):
        return ["state" if (index + 1) % every else "full" for index in range(count)]
    if chunk and (every := _number(words.get("no_rope_layer_interval"))):
        return ["chunk" if (index + 1) % every else "full" for index in range(count)]
    if window and (every := _number(words.get("sliding_window_pattern")) or _number(words.get("_sliding_window_pattern"))):
        return ["window" if (index + 1) % every else "full" for index in range(count)]
    if window and words.get("use_sliding_window") and (first := _number(words.get("max_window_layers"))):
        return ["full" if index < first else "window" for index in range(count)]
    return ["window" if window else "full"] * count


def _kind(word: str, *, has_window: bool, has_chunk: bool) -> str:
    if word in _LINEAR:
        return "state"
    if word == "sliding_attention" and has_window:
        return "window"
    return "chunk" if word == "chunked_attention" and has_chunk else "full"


def _state(words: Mapping[str, Any]) -> int:
    """Elements of a recurrent layer's state, with its short convolution."""
    values = _number(words.get("linear_num_value_heads"))
    if values:
        keys, key_size, size = (_number(words.get(f"linear_{name}")) for name in ("num_key_heads", "key_head_dim", "value_head_dim"))
        return values * size * key_size + (2 * keys * key_size + values * size) * max(_number(words.get("linear_conv_kernel_dim")) - 1, 0)
    inner = _first(words, "mamba_num_heads", "mamba_n_heads") * _first(words, "mamba_head_dim", "mamba_d_head") or 2 * _first(words, "hidden_size")
    width = _first(words, "ssm_state_size", "mamba_d_state", "state_size") or 16
    groups = _first(words, "n_groups", "mamba_n_groups") or 1
    return inner * width + (inner + 2 * groups * width) * 3


def _inner(words: Mapping[str, Any]) -> int:
    """How wide a token becomes within a layer: of a mixture, the experts that see it."""
    experts = _first(words, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1
    one = _first(words, "moe_intermediate_size") or (_first(words, "intermediate_size") if _first(words, "num_local_experts", "num_experts") else 0)
    return max(_first(words, "intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim"), experts * one)


def _context(words: Mapping[str, Any]) -> int:
    found = _first(words, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions", "model_max_length")
    scaling = _mapping(words.get("rope_scaling")) or _mapping(words.get("rope_parameters"))
    if str(scaling.get("rope_type") or scaling.get("type")) == "yarn":
        factor, original = scaling.get("factor"), _number(scaling.get("original_max_position_embeddings")) or found
        if isinstance(factor, int | float) and 0 < factor < 1e6:
            return max(found, int(original * factor))
    return found


def _dtype(words: Mapping[str, Any]) -> str:
    name = str(words.get("dtype") or words.get("torch_dtype") or "").removeprefix("torch.")
    return name if name in SIZES else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(words: Mapping[str, Any], *names: str) -> int:
    return next((number for name in names if (number := _number(words.get(name)))), 0)


def _number(value: object) -> int:
    """A plain count; 0 for whatever else stands there. (Some families write a number for each layer: the first is meant.)"""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST else 0
