"""Models of any shape without weights to speak of: a real config.json, and safetensors files whose data is a hole in the file.

They take no space and no time, and an engine loads them like any other: zeros. For what is decided by shapes alone.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BITS = {"F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "I32": 32, "U8": 8, "I64": 64}
Shapes = dict[str, tuple[int, ...]]


def config(family: str, **more: Any) -> dict[str, Any]:
    """Small, of that model_type; `more` changes it."""
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
    words: dict[str, Any] = {
        "architectures": [names[family]],
        "model_type": family,
        "torch_dtype": "bfloat16",
        "vocab_size": 4000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return words | more


def shapes(words: Mapping[str, Any]) -> Shapes:
    """The tensors that a checkpoint of it has, under the names that hubs have them."""
    hidden, layers, family = words["hidden_size"], words["num_hidden_layers"], words["model_type"]
    found: Shapes = {"model.embed_tokens.weight": (words["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for number in range(layers):
        place = f"model.layers.{number}."
        found |= {f"{place}{name}": shape for name, shape in _layer(words, number).items()}
        found |= {f"{place}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if family == "gemma3_text":
            found |= {f"{place}{name}_feedforward_layernorm.weight": (hidden,) for name in ("pre", "post")}
    if not words["tie_word_embeddings"]:
        found["lm_head.weight"] = (words["vocab_size"], hidden)
    return found


def _layer(words: Mapping[str, Any], number: int) -> Shapes:
    return _attention(words) | (_mlp("mlp.", words["hidden_size"], words["intermediate_size"]) if _is_dense(words, number) else _experts(words))


def _is_dense(words: Mapping[str, Any], number: int) -> bool:
    return not words.get("moe_intermediate_size") or number < words.get("first_k_dense_replace", 0)


def _attention(words: Mapping[str, Any]) -> Shapes:
    hidden, heads, keys, size = (words[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    if rank := words.get("kv_lora_rank"):
        rope, nope, value, query = (words[name] for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank"))
        return {
            "self_attn.q_a_proj.weight": (query, hidden),
            "self_attn.q_a_layernorm.weight": (query,),
            "self_attn.q_b_proj.weight": (heads * (rope + nope), query),
            "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
            "self_attn.kv_a_layernorm.weight": (rank,),
            "self_attn.kv_b_proj.weight": (heads * (nope + value), rank),
            "self_attn.o_proj.weight": (hidden, heads * value),
        }
    found: Shapes = {
        "self_attn.q_proj.weight": (heads * size, hidden),
        "self_attn.k_proj.weight": (keys * size, hidden),
        "self_attn.v_proj.weight": (keys * size, hidden),
        "self_attn.o_proj.weight": (hidden, heads * size),
    }
    norms = {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    return found | (norms if words["model_type"] in ("qwen3", "qwen3_moe", "gemma3_text") else {})


def _mlp(place: str, hidden: int, inner: int) -> Shapes:
    return {f"{place}gate_proj.weight": (inner, hidden), f"{place}up_proj.weight": (inner, hidden), f"{place}down_proj.weight": (hidden, inner)}


def _experts(words: Mapping[str, Any]) -> Shapes:
    hidden, inner = words["hidden_size"], words["moe_intermediate_size"]
    count = words.get("num_experts") or words["n_routed_experts"]
    found: Shapes = {"mlp.gate.weight": (count, hidden)}
    for expert in range(count):
        found |= _mlp(f"mlp.experts.{expert}.", hidden, inner)
    if shared := words.get("n_shared_experts"):
        found |= _mlp("mlp.shared_experts.", hidden, shared * inner)
        found["mlp.gate.e_score_correction_bias"] = (count,)
    return found


def write(directory: Path, words: Mapping[str, Any], dtype: str = "BF16", shards: int = 1, tensors: Mapping[str, tuple[int, ...]] | None = None) -> Path:
    """A model directory; `tensors` instead of those of `shapes`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(words))
    named = dict(shapes(words) if tensors is None else tensors)
    names = list(named)
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        hole(directory / file, {name: (dtype, named[name]) for name in part})
    return directory


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """The beginning of a safetensors file, and how many bytes of data are to follow it."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text, offset


def hole(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    begin, size = header(tensors)
    path.write_bytes(begin)
    with path.open("r+b") as file:
        file.truncate(len(begin) + size)
