"""Pure: from the tensors that a model's files name to the bytes that each GPU holds of them.

Linear layers, experts and embeddings are shared out among the GPUs of a tensor-parallel group; norms, routers and the latent
projections of MLA are on each of them; key and value projections are shared out as far as there are heads. Layers go to pipeline
stages as the engine shares them out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vllmd.core.architecture import Architecture

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d{1,5})\.")
_TOWER = re.compile(r"vision|visual|audio|image|mm_proj|multi_modal|multimodal|\bvit\b|speech")
_KEPT = re.compile(r"scale|zero|g_idx|A_log|e_score_correction")
"""Stays in the type that the file has."""
_COPIED = re.compile(r"norm|\.gate\.weight$|router|kv_a_proj|q_a_proj|fused_qkv_a|e_score|shared_expert_gate|position_embeddings|wpe\.")
_EMBEDDING = re.compile(r"embed_tokens|\bwte\b|word_embeddings|tok_embeddings|embed_in\b")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.")
_KEYS = re.compile(r"\.(?:k_proj|v_proj|key|value)\.")
_LINEAR = re.compile(r"_proj|experts|fc\d|dense|query_key_value|\bw[123]\b|c_attn|c_proj|c_fc")
_VOCAB_PADDING = 64
"""Rows of embeddings are made a multiple of that."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a header. `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of one place: shared out, shared out as far as there are key heads, on every GPU."""

    split: float = 0.0
    keys: float = 0.0
    copied: float = 0.0

    def __add__(self, other: Share) -> Share:
        return Share(self.split + other.split, self.keys + other.keys, self.copied + other.copied)

    def per_gpu(self, tensor_parallel: int, key_heads: int) -> float:
        return self.split / tensor_parallel + self.keys / min(tensor_parallel, max(key_heads, 1)) + self.copied

    @property
    def total(self) -> float:
        return self.split + self.keys + self.copied


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the bytes are. `linear` is that part of them which a quantised variant would have smaller; `is_exact`: counted tensor by
    tensor, and not from the sizes of files."""

    layers: Mapping[int, Share] = field(default_factory=dict)
    embedding: Share = Share()
    head: Share = Share()
    rest: Share = Share()
    linear: float = 0.0
    is_tied: bool = False
    is_exact: bool = True

    @property
    def total(self) -> int:
        return math.ceil(sum(share.total for share in (*self.layers.values(), self.embedding, self.head, self.rest)))


def count(tensors: Iterable[Tensor], model: Architecture, float_bytes: int, online_bits: int = 0) -> Weights:
    """`float_bytes` of each element that is loaded in the model's own type. `online_bits`: linear layers are quantised to that while
    they are loaded (0: they stay as they are)."""
    layers: dict[int, Share] = {}
    places = {"embedding": Share(), "head": Share(), "rest": Share()}
    linear = 0.0
    last = len(model.layers)
    for tensor in tensors:
        number = _layer_of(tensor.name)
        if "rotary_emb" in tensor.name or tensor.name.startswith("mtp.") or (last and number is not None and number >= last):
            continue  # computed, or drafts of tokens to come: not loaded
        if model.is_tied and _HEAD.search(tensor.name) and number is None:
            continue
        held = _held(tensor, float_bytes, online_bits)
        share = _share(tensor, held)
        if number is not None:
            layers[number] = layers.get(number, Share()) + share
            linear += held if tensor.dtype in FLOATS and _is_linear(tensor) else 0.0
        else:
            place = "embedding" if _EMBEDDING.search(tensor.name) else "head" if _HEAD.search(tensor.name) else "rest"
            places[place] += share
    return Weights(layers, places["embedding"], places["head"], places["rest"], linear, model.is_tied)


def of_files(size: int, model: Architecture) -> Weights:
    """Where only the sizes of the files are known: all shared out, each layer alike."""
    return Weights(rest=Share(split=float(size)), linear=0.9 * size, is_tied=model.is_tied, is_exact=False) if not model.layers else Weights(
        {number: Share(split=size / len(model.layers)) for number in range(len(model.layers))}, linear=0.9 * size, is_tied=model.is_tied, is_exact=False
    )


def stages(layers: int, pipeline_parallel: int) -> list[range]:
    """Which layers are on which stage. What is left over goes to the last but one, and on towards the first, never to the last."""
    counts = [layers // pipeline_parallel] * pipeline_parallel
    for index in range(2, layers % pipeline_parallel + 2):
        counts[-index] += 1
    begins = [sum(counts[:index]) for index in range(pipeline_parallel)]
    return [range(begin, begin + length) for begin, length in zip(begins, counts, strict=True)]


def per_gpu(weights: Weights, model: Architecture, tensor_parallel: int, pipeline_parallel: int) -> list[int]:
    """Bytes on each GPU of each stage."""
    key_heads = max((layer.heads for layer in model.layers if layer.kind in ("full", "window", "chunk")), default=1)
    found = []
    for number, stage in enumerate(stages(len(model.layers), pipeline_parallel)):
        share = sum((weights.layers.get(index, Share()) for index in stage), Share())
        if number == 0:
            share += weights.embedding + weights.rest
        if number == pipeline_parallel - 1:
            share += weights.head
            if weights.is_tied and pipeline_parallel > 1:
                share += weights.embedding
        found.append(math.ceil(share.per_gpu(tensor_parallel, key_heads)))
    return found


def common_float(tensors: Iterable[Tensor]) -> str:
    """The type that most elements have, for a config.json that does not say it."""
    elements: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + math.prod(tensor.shape)
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    return names[max(elements, key=lambda name: elements[name])] if elements else ""


def key_rows(tensors: Iterable[Tensor]) -> int:
    """Rows of the first key projection that is not quantised or packed; 0 where there is none."""
    for tensor in tensors:
        if tensor.name.endswith("k_proj.weight") and tensor.dtype in FLOATS and len(tensor.shape) == 2 and _layer_of(tensor.name) is not None:
            return tensor.shape[0]
    return 0


def _layer_of(name: str) -> int | None:
    if _TOWER.search(name):
        return None
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def _is_linear(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1 and bool(_LINEAR.search(tensor.name)) and not _COPIED.search(tensor.name)


def _held(tensor: Tensor, float_bytes: int, online_bits: int) -> float:
    """Bytes in memory."""
    if tensor.dtype not in FLOATS or _KEPT.search(tensor.name):
        return float(tensor.bytes)
    elements = math.prod(tensor.shape)
    if (_EMBEDDING.search(tensor.name) or _HEAD.search(tensor.name)) and len(tensor.shape) == 2:
        elements = -(-tensor.shape[0] // _VOCAB_PADDING) * _VOCAB_PADDING * tensor.shape[1]
    elif online_bits and _is_linear(tensor):
        return elements * online_bits / 8
    return float(elements * float_bytes)


def _share(tensor: Tensor, held: float) -> Share:
    if len(tensor.shape) < 2 or _COPIED.search(tensor.name):
        return Share(copied=held)
    return Share(keys=held) if _KEYS.search(tensor.name) and not _TOWER.search(tensor.name) else Share(split=held)
