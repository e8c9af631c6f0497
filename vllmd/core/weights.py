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
from functools import lru_cache
from typing import NamedTuple

from vllmd.core.architecture import Architecture

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d{1,5})\.")
# Words of names, and no expressions: ten of those take as long to compile as the rest of `vllmd check`.
_TOWER = ("vision", "visual", "audio", "image", "mm_proj", "multi_modal", "multimodal", "vit.", "speech")
_KEPT = ("scale", "zero", "g_idx", "A_log", "e_score_correction")
"""Stays in the type that the file has."""
_COPIED = ("norm", ".gate.weight", "router", "kv_a_proj", "q_a_proj", "fused_qkv_a", "e_score", "shared_expert_gate", "position_embeddings", "wpe.")
_EMBEDDING = ("embed_tokens", "wte.", "word_embeddings", "tok_embeddings", "embed_in.")
_HEAD = ("lm_head.", "embed_out.", "output.")
_LAST = ("norm.", "ln_f.", "final_layernorm.", "final_layer_norm.")
_KEYS = (".k_proj.", ".v_proj.", ".key.", ".value.")
_LINEAR = ("_proj", "experts", "fc1", "fc2", "dense", "query_key_value", ".w1.", ".w2.", ".w3.", "c_attn", "c_fc")
_LONGEST = 300
"""Of a name, what is looked at."""
_VOCAB_PADDING = 64
"""Rows of embeddings are made a multiple of that."""


class Tensor(NamedTuple):
    """One tensor of a header. `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Share(NamedTuple):
    """Bytes of one place: shared out, shared out as far as there are key heads, on every GPU."""

    split: float = 0.0
    keys: float = 0.0
    copied: float = 0.0

    def per_gpu(self, tensor_parallel: int, key_heads: int) -> float:
        return self.split / tensor_parallel + self.keys / min(tensor_parallel, max(key_heads, 1)) + self.copied

    @property
    def total(self) -> float:
        return self.split + self.keys + self.copied


NOTHING = Share()


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the bytes are. `linear` is that part of them which a quantised variant would have smaller; `is_exact`: counted tensor by
    tensor, and not from the sizes of files."""

    layers: Mapping[int, Share] = field(default_factory=dict)
    embedding: Share = NOTHING
    head: Share = NOTHING
    rest: Share = NOTHING
    linear: float = 0.0
    is_tied: bool = False
    is_exact: bool = True

    @property
    def total(self) -> int:
        return math.ceil(sum(share.total for share in (*self.layers.values(), self.embedding, self.head, self.rest)))


class _Traits(NamedTuple):
    """What a name says, whatever the numbers in it: expert 17 of layer 40 is as any other."""

    is_layer: bool
    is_skipped: bool
    is_kept: bool
    is_copied: bool
    is_embedding: bool
    is_head: bool
    is_last: bool
    is_keys: bool
    is_linear: bool


_DIGITS = re.compile(r"\.\d+\.")


@lru_cache(maxsize=4096)
def _named(name: str) -> _Traits:
    in_tower = _has(name, _TOWER)
    is_layer = not in_tower and bool(_LAYER.search(name))
    last = name.removeprefix("language_").removeprefix("model.").removeprefix("language_model.").removeprefix("model.").removeprefix("transformer.")
    return _Traits(
        is_layer=is_layer,
        is_skipped="rotary_emb" in name or name.startswith("mtp."),
        is_kept=_has(name, _KEPT),
        is_copied=_has(name, _COPIED),
        is_embedding=not is_layer and _has(name, _EMBEDDING),
        is_head=not is_layer and last.startswith(_HEAD),
        is_last=not is_layer and not in_tower and last.startswith(_LAST),
        is_keys=not in_tower and _has(name, _KEYS),
        is_linear=_has(name, _LINEAR),
    )


def _has(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name for word in words)


def _traits(name: str) -> _Traits:
    return _named(_DIGITS.sub(".0.", name[:_LONGEST]))


def count(tensors: Iterable[Tensor], model: Architecture, float_bytes: int, online_bits: int = 0) -> Weights:
    """`float_bytes` of each element that is loaded in the model's own type. `online_bits`: linear layers are quantised to that while
    they are loaded (0: they stay as they are)."""
    layers: dict[int, list[float]] = {}
    places = {"embedding": [0.0] * 3, "head": [0.0] * 3, "rest": [0.0] * 3}
    linear = 0.0
    last = len(model.layers)
    for tensor in tensors:
        traits = _traits(tensor.name)
        number = _layer_of(tensor.name) if traits.is_layer else None
        if traits.is_skipped or (last and number is not None and number >= last) or (model.is_tied and traits.is_head):
            continue  # computed, or drafts of tokens to come: not loaded; or the embeddings again
        held = _held(tensor, traits, float_bytes, online_bits)
        if number is None:
            at = places["embedding" if traits.is_embedding else "head" if traits.is_head or traits.is_last else "rest"]
        else:
            at = layers.setdefault(number, [0.0] * 3)
            linear += held if tensor.dtype in FLOATS and _is_linear(tensor, traits) else 0.0
        at[_share(tensor, traits)] += held
    shares = {name: Share(*sums) for name, sums in places.items()}
    return Weights({number: Share(*sums) for number, sums in layers.items()}, shares["embedding"], shares["head"], shares["rest"], linear, model.is_tied)


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
        shares = [weights.layers[index] for index in stage if index in weights.layers]
        shares += [weights.embedding, weights.rest] if number == 0 else []
        if number == pipeline_parallel - 1:
            shares += [weights.head, *([weights.embedding] if weights.is_tied and pipeline_parallel > 1 else [])]
        found.append(math.ceil(sum(share.per_gpu(tensor_parallel, key_heads) for share in shares)))
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
        if tensor.name.endswith("k_proj.weight") and tensor.dtype in FLOATS and len(tensor.shape) == 2 and _traits(tensor.name).is_layer:
            return tensor.shape[0]
    return 0


def _layer_of(name: str) -> int | None:
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def _is_linear(tensor: Tensor, traits: _Traits) -> bool:
    return len(tensor.shape) > 1 and traits.is_linear and not traits.is_copied


def _held(tensor: Tensor, traits: _Traits, float_bytes: int, online_bits: int) -> float:
    """Bytes in memory."""
    if tensor.dtype not in FLOATS or traits.is_kept:
        return float(tensor.bytes)
    elements = math.prod(tensor.shape)
    if (traits.is_embedding or traits.is_head) and len(tensor.shape) == 2:
        elements = -(-tensor.shape[0] // _VOCAB_PADDING) * _VOCAB_PADDING * tensor.shape[1]
    elif online_bits and _is_linear(tensor, traits):
        return elements * online_bits / 8
    return float(elements * float_bytes)


def _share(tensor: Tensor, traits: _Traits) -> int:
    """Which field of a Share."""
    if len(tensor.shape) < 2 or traits.is_copied:
        return 2
    return 1 if traits.is_keys else 0
