"""Well-known models as their hubs have them, typed in: config.json as far as it decides, and the tensors of their checkpoints.

The expectations are worked out by hand from the papers and model cards, not by the code under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from tests import synthetic_models
from vllmd.core.weights import Tensor

GIB = 1 << 30
LLAMA_8B = synthetic_models.config(
    "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    max_position_embeddings=131072, rope_scaling={"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
)  # fmt: skip
QWEN3_30B = synthetic_models.config(
    "qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, max_position_embeddings=40960, use_sliding_window=False, sliding_window=None,
    max_window_layers=48,
)  # fmt: skip
DEEPSEEK_V3 = synthetic_models.config(
    "deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
    num_experts_per_tok=8, first_k_dense_replace=3, num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, kv_lora_rank=512, q_lora_rank=1536,
    qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, max_position_embeddings=163840, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
)  # fmt: skip
GEMMA3_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
                    "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "model_type": "siglip_vision_model"},
}  # fmt: skip
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "torch_dtype": "bfloat16", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "vocab_size": 201088,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "torch_dtype": "bfloat16", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "vocab_size": 151936, "max_position_embeddings": 262144,
}  # fmt: skip


def tensors(words: dict[str, Any], dtype: str = "BF16") -> Iterator[Tensor]:
    for name, shape in synthetic_models.shapes(words).items():
        yield Tensor(name, dtype, shape, prod(shape) * synthetic_models.BITS[dtype] // 8)


def deepseek_tensors() -> Iterator[Tensor]:
    """Linear layers in fp8 with a float32 scale for each block of 128 x 128; a 62nd layer that drafts tokens (MTP) and is not loaded."""
    for each in tensors(DEEPSEEK_V3 | {"num_hidden_layers": 62}):
        if "_proj" in each.name:
            rows, columns = each.shape
            yield Tensor(each.name, "F8_E4M3", each.shape, rows * columns)
            blocks = (-(-rows // 128), -(-columns // 128))
            yield Tensor(f"{each.name}_scale_inv", "F32", blocks, 4 * prod(blocks))
        else:
            yield each


def gemma_tensors() -> Iterator[Tensor]:
    """The language model under its prefix, and some of the tower that sees."""
    words = GEMMA3_27B["text_config"] | {"vocab_size": 262208, "tie_word_embeddings": True}  # type: ignore[operator]
    for each in tensors(words):
        yield Tensor(f"language_model.{each.name}", each.dtype, each.shape, each.bytes)
    yield Tensor("vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight", "BF16", (1152, 1152), 2 * 1152 * 1152)


@dataclass(frozen=True)
class Known:
    """`weights` in bytes, of one GPU that has it all; `kv` of one request of `length` tokens there."""

    name: str
    config: dict[str, Any]
    weights: int
    length: int
    kv: int
    per_token: int
    tensors: list[Tensor] = field(repr=False)
    gpu_gib: int = 80


KNOWN = [
    # 8,030,261,248 parameters; 2 x 8 heads x 128 x 2 bytes x 32 layers = 128 KiB a token
    Known("Llama-3.1-8B", LLAMA_8B, 16_060_522_496, 131072, 16 * GIB, 131072, list(tensors(LLAMA_8B))),
    # 30,532,122,624 parameters; 2 x 4 x 128 x 2 x 48 = 96 KiB a token
    Known("Qwen3-30B-A3B", QWEN3_30B, 61_064_245_248, 40960, 40960 * 98304, 98304, list(tensors(QWEN3_30B))),
    # Layers of 187,105,280 (attention, q_a_proj to o_proj), 3 of 396,361,728 (dense), 58 of 257 x 44,040,192 (experts) in fp8, a scale of 4 bytes for 16384 of them;
    # 58 routers of 1,835,008, 2 x 129280 x 7168 of embeddings, and norms in bf16. One latent of 512 + 64, in 61 layers, 2 bytes: 70,272 a token
    Known("DeepSeek-V3", DEEPSEEK_V3, 673_237_000_000, 163840, 163840 * 70272, 70272, list(deepseek_tensors()), 288),
    # 27,009,346,304 parameters of text, of which the tower that sees adds little here. 10 layers of all tokens, 52 of a window of 1024 in six groups:
    # blocks of 16 tokens x 16 heads x 256 x 2 bytes x 10 layers = 1,310,720; 8192 of them, and 6 x (ceil((1023 + 2 x 8192) / 16) + 1)
    Known("Gemma-3-27B", GEMMA3_27B, 54_018_692_608 + 2_654_208, 131072, (8192 + 6 * 1089) * 1_310_720, 10 * 8192, list(gemma_tensors())),
]
