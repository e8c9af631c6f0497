"""Pure: how much memory each GPU needs to serve a model, before anything is loaded: weights, KV cache, and what comes on top.

The KV cache is counted as vLLM 0.32 lays it out: blocks of tokens, layers of one kind in groups of one size, a window kept only as far
as it reaches. What comes on top (the driver's context, activations, graphs) is a rough figure, on the safe side; docs/sizing.md says of what.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllmd.core import weights as shares
from vllmd.core.architecture import SIZES, Architecture, Layer
from vllmd.core.weights import Weights

GIB = 1 << 30
_BLOCK, _CPU_BLOCK, _CPU_MLA_BLOCK = 16, 128, 16
_KV_BYTES = {"fp8": 1.0, "int8": 1.0, "int4": 0.5, "nvfp4": 0.5625, "turboquant": 0.5, "ultraquant": 0.5}
_CPU_OVERHEAD = 1 * GIB
_CONTEXT, _PEERS = GIB // 2, GIB // 2
"""The driver's context and the libraries' own; and once more for talking with other GPUs."""
_SAMPLER_BYTES = 16
"""Of each entry of the vocabulary for each request of a batch: logits in float32, sorted, their indices."""
_GRAPHS, _GRAPH_LAYER = GIB // 4, 8 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """How it is to be served. 0 and '' mean: as the engine decides. `gpu_bytes`: the memory of one GPU, as far as the engine's own
    defaults depend on it. `kv_bytes`: what a CPU engine is told to take for the cache (0: not told)."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    max_model_len: int = 0
    dtype: str = ""
    kv_dtype: str = ""
    online: str = ""
    """Quantised while it is loaded: fp8 or bitsandbytes."""
    fraction: float = 0.92
    batched_tokens: int = 0
    requests: int = 0
    is_eager: bool = False
    is_cpu: bool = False
    block: int = 0
    gpu_bytes: int = 0
    kv_bytes: int = 0

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def tokens(self) -> int:
        """Of one step."""
        if self.batched_tokens:
            return self.batched_tokens
        if self.is_cpu:
            return 2048 * self.gpus
        return 16384 if self.gpu_bytes >= 160 * GIB else 8192 if self.gpu_bytes >= 70 * GIB else 2048

    @property
    def in_flight(self) -> int:
        """Tokens of all steps that may be under way at once: beside a window, they are kept too."""
        return self.tokens * (1 if self.is_cpu else max(2, self.pipeline_parallel))

    @property
    def sequences(self) -> int:
        return self.requests or (128 * self.gpus if self.is_cpu else 1024 if self.gpu_bytes >= 70 * GIB else 256)


class Group(NamedTuple):
    """`number` groups of layers that share their blocks, one page a block each; `layer` is one of them."""

    layer: Layer
    number: int


class Cache(NamedTuple):
    """How the KV cache of one GPU is laid out. `page` is the bytes of a block in all layers of one group."""

    groups: tuple[Group, ...]
    page: int
    block: int
    in_flight: int

    def blocks(self, length: int) -> int:
        """That one request of this length takes."""
        return sum(group.number * _pages(group.layer, length, self.block, self.in_flight) for group in self.groups)

    def bytes(self, length: int) -> int:
        return self.blocks(length) * self.page

    def tokens(self, available: int, length: int) -> int:
        """How many it has room for, as the engine reckons: whole requests of this length, and the part of one that is left."""
        needed = self.blocks(length)
        return int(available // self.page / needed * length) if needed and self.page else 0

    def longest(self, available: int, limit: int) -> int:
        """The longest request that it has room for, `limit` at most; one block is always kept back."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes(middle) + self.page <= available else (low, middle - 1)
        return low


NO_CACHE = Cache((), 0, 1, 0)


class Estimate(NamedTuple):
    """Of the GPU that needs the most. `length` is the request that the cache is reckoned for: the longest that may be asked."""

    weights: int
    cache: Cache
    overhead: int
    length: int
    wanted: Wanted
    dtype: str
    is_exact: bool = True

    @property
    def kv(self) -> int:
        """Of one request of the full length."""
        return self.cache.bytes(self.length)

    @property
    def fixed(self) -> int:
        return self.weights + self.overhead

    @property
    def needed(self) -> int:
        return self.fixed + self.kv + self.cache.page

    @property
    def per_token(self) -> int:
        """Bytes of one more token, beyond every window."""
        return self.cache.page * sum(group.number for group in self.cache.groups if group.layer.kind in ("full", "mla")) // self.cache.block


def estimate(model: Architecture, held: Weights, wanted: Wanted, dtype: str = "") -> Estimate:
    """`dtype`: the model's own type where config.json does not say it."""
    used = dtype_of(model, wanted, dtype)
    parts = shares.per_gpu(held, model, wanted.tensor_parallel, wanted.pipeline_parallel)
    caches = [cache_of([model.layers[index] for index in stage], model, wanted, used) for stage in shares.stages(len(model.layers), wanted.pipeline_parallel)]
    length = wanted.max_model_len or model.context or 4096
    extra = overhead(model, wanted, used)
    heaviest = max(range(len(parts)), key=lambda stage: parts[stage] + caches[stage].bytes(length))
    return Estimate(parts[heaviest], caches[heaviest], extra, length, wanted, used, held.is_exact)


def dtype_of(model: Architecture, wanted: Wanted, found: str = "") -> str:
    """What unquantised weights are loaded as: without a word, a float32 model as bfloat16."""
    if wanted.dtype in SIZES:
        return wanted.dtype
    own = model.dtype or found or "bfloat16"
    return "bfloat16" if SIZES[own] > 2 else own


def kv_bytes(model: Architecture, wanted: Wanted, dtype: str) -> float:
    """Of one element of the cache."""
    said = wanted.kv_dtype
    if said in ("", "auto"):
        return 1.0 if model.is_kv_fp8 else SIZES[dtype]
    if said in SIZES:
        return SIZES[said]
    return next((size for begin, size in _KV_BYTES.items() if said.startswith(begin)), SIZES[dtype])


def cache_of(layers: Sequence[Layer], model: Architecture, wanted: Wanted, dtype: str) -> Cache:
    """Layers of a kind form groups of as many layers as the rarest kind has, so that all groups draw on one pool of blocks."""
    kinds = Counter(layer for layer in layers if layer.kind != "none")
    if not kinds:
        return NO_CACHE
    block = wanted.block or ((_CPU_MLA_BLOCK if model.is_mla else _CPU_BLOCK) if wanted.is_cpu else _BLOCK)
    element = kv_bytes(model, wanted, dtype)
    pages = {layer: _page(layer, block, element, SIZES[dtype], wanted.tensor_parallel) for layer in kinds}
    page = max(pages.values())
    if len(set(pages.values())) > 1:  # brought to one size by longer blocks or padding: reckoned as if nothing were lost by that
        return Cache(tuple(Group(layer, number * pages[layer]) for layer, number in kinds.items()), 1, block, wanted.in_flight)
    fewest, most = min(kinds.values()), max(kinds.values())
    size = most if most < fewest * 1.5 else fewest
    return Cache(tuple(Group(layer, -(-number // size)) for layer, number in kinds.items()), page * size, block, wanted.in_flight)


def _page(layer: Layer, block: int, element: float, state_element: int, tensor_parallel: int) -> int:
    """Bytes of one block of one layer, on one GPU. Heads are repeated where there are more GPUs than heads."""
    if layer.kind == "state":
        return math.ceil(layer.state * state_element / tensor_parallel)
    heads = 1 if layer.kind == "mla" else max(1, layer.heads // tensor_parallel)
    return math.ceil(heads * layer.size * block * element)


def _pages(layer: Layer, length: int, block: int, in_flight: int) -> int:
    """Blocks of one group for one request."""
    match layer.kind:
        case "state":
            return 1
        case "window":
            return -(-min(layer.span - 1 + in_flight, length) // block) + 1
        case "chunk":
            return -(-min(layer.span + in_flight, length) // block)
        case _:
            return -(-length // block)


def overhead(model: Architecture, wanted: Wanted, dtype: str) -> int:
    """What is neither weights nor cache. Rough, and rather too much than too little."""
    tokens = min(wanted.tokens, wanted.max_model_len or wanted.tokens) if wanted.is_cpu else wanted.tokens
    step = tokens * SIZES[dtype] * (8 * model.hidden + 2 * model.inner // wanted.tensor_parallel)
    if wanted.is_cpu:
        return _CPU_OVERHEAD + step
    sampler = min(wanted.sequences, wanted.tokens) * model.vocab * _SAMPLER_BYTES
    graphs = 0 if wanted.is_eager else _GRAPHS + _GRAPH_LAYER * len(model.layers)
    return _CONTEXT + (_PEERS if wanted.gpus > 1 else 0) + step + sampler + graphs
