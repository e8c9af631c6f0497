"""The estimate of a model's memory: well-known models by hand-computed figures, and laws that hold for every model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import synthetic_models
from tests.unit import sizing_cases as cases
from tests.unit.sizing_cases import GIB, KNOWN, Known
from vllmd.core import architecture, sizing, weights
from vllmd.core.architecture import Architecture, Layer
from vllmd.core.sizing import Estimate, Wanted, estimate
from vllmd.core.sizing_verdict import Case, Device, Verdict, Word, budget_of, judge, smallest_gpu
from vllmd.core.weights import Tensor, Weights
from vllmd.models.headers import Facts
from vllmd.preflight import sizing_show
from vllmd.preflight.sizing import size_up

pytestmark = pytest.mark.unit


ANY = Wanted()


def counted(config: dict[str, Any], tensors: list[Tensor], wanted: Wanted = ANY, online: int = 0) -> tuple[Architecture, Weights, Estimate]:
    model = architecture.corrected(architecture.parse(config), weights.key_rows(tensors))
    dtype = sizing.dtype_of(model, wanted, weights.common_float(tensors))
    held = weights.count(tensors, model, architecture.SIZES[dtype], online)
    return model, held, estimate(model, held, wanted)


def judged(known: Known, wanted: Wanted, device: Device | None, gpus: int = 1) -> tuple[Case, Verdict]:
    wanted = replace(wanted, gpu_bytes=device.total if device else 0)
    model, held, found = counted(known.config, known.tensors, wanted)
    case = Case(model, held, wanted)
    return case, judge(case, found, device, gpus)


# -- well-known models


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_a_well_known_model_is_what_its_card_says(known: Known) -> None:
    _, held, found = counted(known.config, known.tensors, Wanted(gpu_bytes=known.gpu_gib * GIB if known.gpu_gib < 160 else 0, batched_tokens=8192))
    assert held.total == pytest.approx(known.weights, rel=0.002)
    assert found.weights == held.total
    assert (found.length, found.kv, found.per_token) == (known.length, known.kv, known.per_token)


def test_heads_are_repeated_where_there_are_more_gpus() -> None:
    known = KNOWN[1]
    one, eight = (counted(known.config, known.tensors, Wanted(tensor_parallel=count))[2] for count in (1, 8))
    assert one.kv == 4 * eight.kv, "4 heads on 8 GPUs: each has one"
    keys = 2 * 48 * 4 * 128 * 2048 * 2
    routers_and_norms = 48 * 128 * 2048 * 2 + 2 * (2 * 48 * 2048 + 2 * 48 * 128 + 2048)
    assert eight.weights == pytest.approx((one.weights - keys - routers_and_norms) / 8 + keys / 4 + routers_and_norms, rel=1e-4)


def test_the_latent_of_mla_is_on_every_gpu() -> None:
    known = KNOWN[2]
    one, eight = (counted(known.config, known.tensors, Wanted(tensor_parallel=count))[2] for count in (1, 8))
    assert one.kv == eight.kv == 163840 * 70272
    copied = 61 * (7168 * 1536 + 7168 * 576) + 58 * 2 * 7168 * 256
    assert eight.weights == pytest.approx((one.weights - copied) / 8 + copied, rel=0.001)
    _, verdict = judged(known, Wanted(tensor_parallel=8, max_model_len=32768), Device("H200", 141 * GIB), 8)
    assert verdict.word == "fits"


def test_a_model_of_windows_and_whole_layers_alike_in_number() -> None:
    model = architecture.parse(cases.GPT_OSS_20B)
    assert [layer.kind for layer in model.layers[:3]] == ["window", "full", "window"]
    cache = sizing.cache_of(model.layers, model, Wanted(batched_tokens=8192), "bfloat16")
    page = 12 * 8 * 128 * 16 * 2
    assert (cache.page, cache.blocks(131072)) == (page, 8192 + -(-(127 + 16384) // 16) + 1)


def test_a_recurrent_layer_keeps_the_same_of_every_request() -> None:
    model = architecture.parse(cases.QWEN3_NEXT)
    cache = sizing.cache_of(model.layers, model, Wanted(), "bfloat16")
    state = 2 * (32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128))
    token = 2 * 2 * 256 * 2 * 12
    assert cache.bytes(262144) == 262144 * token + 36 * state
    assert cache.bytes(16) == 16 * token + 36 * state


def test_stages_have_their_layers_and_the_ends_the_embeddings() -> None:
    assert [list(stage) for stage in weights.stages(7, 3)] == [[0, 1], [2, 3, 4], [5, 6]]
    model, held, whole = counted(cases.LLAMA_8B, KNOWN[0].tensors)
    first, last = weights.per_gpu(held, model, 1, 2)
    embedding = 128256 * 4096 * 2
    assert first == (held.total - 2 * embedding - 8192) / 2 + embedding
    assert last == first + 8192
    assert estimate(model, held, Wanted(pipeline_parallel=2)).kv * 2 == whole.kv


def test_tied_embeddings_count_once_and_twice_at_both_ends_of_a_pipeline() -> None:
    words = synthetic_models.config("qwen3", tie_word_embeddings=True)
    stored = [*cases.tensors(words), Tensor("lm_head.weight", "BF16", (4000, 512), 4000 * 512 * 2)]
    model, held, _ = counted(words, stored)
    padded = 4032 * 512 * 2
    assert held.total == sum(each.bytes for each in cases.tensors(words)) - 4000 * 512 * 2 + padded
    assert sum(weights.per_gpu(held, model, 1, 2)) == held.total + padded


@pytest.mark.parametrize(
    ("stored", "wanted", "element"),
    [("F32", "", 2), ("F32", "float32", 4), ("BF16", "", 2), ("BF16", "float32", 4), ("F16", "", 2)],
)
def test_what_is_not_quantised_is_loaded_in_the_models_type(stored: str, wanted: str, element: int) -> None:
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    words = synthetic_models.config("llama", torch_dtype=names[stored], vocab_size=4032)
    _, held, found = counted(words, list(cases.tensors(words, stored)), Wanted(dtype=wanted))
    assert held.total == element * sum(each.bytes for each in cases.tensors(words, "U8"))
    assert found.per_token == 4 * 2 * 2 * 64 * element


def test_packed_weights_stay_as_they_are() -> None:
    words = synthetic_models.config("llama", quantization_config={"quant_method": "awq", "bits": 4})
    packed = [
        Tensor("model.layers.0.mlp.up_proj.qweight", "I32", (512, 176), 512 * 176 * 4),
        Tensor("model.layers.0.mlp.up_proj.qzeros", "I32", (4, 176), 4 * 176 * 4),
        Tensor("model.layers.0.mlp.up_proj.scales", "F16", (4, 1408), 4 * 1408 * 2),
    ]
    _, held, _ = counted(words, packed, Wanted(dtype="float32"))
    assert held.total == sum(each.bytes for each in packed)


def test_quantised_while_it_is_loaded() -> None:
    _, whole, _ = counted(cases.LLAMA_8B, KNOWN[0].tensors)
    _, small, _ = counted(cases.LLAMA_8B, KNOWN[0].tensors, Wanted(online="fp8"), online=8)
    assert whole.total - small.total == whole.linear / 2 == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)


@pytest.mark.parametrize(("kv_dtype", "share"), [("auto", 1.0), ("fp8", 0.5), ("fp8_e5m2", 0.5), ("bfloat16", 1.0), ("nvfp4", 0.28125)])
def test_a_cache_in_a_smaller_type(kv_dtype: str, share: float) -> None:
    model = architecture.parse(cases.LLAMA_8B)
    cache = sizing.cache_of(model.layers, model, Wanted(kv_dtype=kv_dtype), "bfloat16")
    assert cache.bytes(131072) == 16 * GIB * share


def test_a_checkpoint_that_brings_its_own_cache_type() -> None:
    words = cases.LLAMA_8B | {"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}}
    assert architecture.parse(words).is_kv_fp8
    assert not architecture.parse(cases.DEEPSEEK_V3).is_kv_fp8


def test_where_config_json_is_silent_the_tensors_speak() -> None:
    words = {key: value for key, value in synthetic_models.config("llama").items() if key != "head_dim"} | {"hidden_size": 768}
    model = architecture.corrected(architecture.parse(words), 128)
    assert {layer.size for layer in model.layers} == {128}
    assert "heads of 64" in model.notes[-1]


# -- verdicts and advice


RTX4090, H100 = Device("GPU 0 RTX 4090", 24 * GIB - (1 << 20)), Device("GPU 0 H100", 80 * GIB)


def test_too_long_a_context_and_every_way_out_is_true() -> None:
    case, verdict = judged(KNOWN[0], Wanted(), RTX4090)
    assert (verdict.word, verdict.advice[0].split(":")[0]) == ("too_long", "set serve.max_model_len")
    length = int(verdict.advice[0].rpartition(" ")[2])
    shorter = case.again(max_model_len=length)
    assert shorter.needed <= budget_of(shorter, RTX4090) < case.again(max_model_len=length + 512).needed
    parallel = next(line for line in verdict.advice if "tensor_parallel_size: 2" in line)
    assert "this host has 1" in parallel
    wide = case.again(tensor_parallel=2)
    assert wide.needed <= budget_of(wide, RTX4090)


def test_too_large_a_model_wants_more_gpus_or_a_quantised_variant() -> None:
    known = KNOWN[1]
    case, verdict = judged(known, Wanted(max_model_len=8192), Device("GPU 0 L40S", 48 * GIB))
    assert verdict.word == "too_large"
    assert "set serve.tensor_parallel_size: 2" in verdict.advice[0]
    assert any(("FP8" in line and "29.0" in line) or "FP8" in line for line in verdict.advice)
    assert not any("max_model_len" in line for line in verdict.advice), "no length helps"
    assert case.again().fixed > 48 * GIB


def test_heads_that_cannot_be_shared_out() -> None:
    _, verdict = judged(KNOWN[0], Wanted(tensor_parallel=3), H100, 4)
    assert verdict.what == "32 attention heads cannot be shared out among 3 GPUs"
    assert "serve.tensor_parallel_size: 4" in verdict.advice[0]


def test_memory_that_others_have_now() -> None:
    _, verdict = judged(KNOWN[0], Wanted(max_model_len=8192), replace(H100, free=60 * GIB))
    assert verdict.word == "busy"
    assert verdict.advice == ("end what uses it: `vllmctl gpu` shows who has it", "or set serve.gpu_memory_utilization: 0.74")
    _, verdict = judged(KNOWN[0], Wanted(max_model_len=8192, fraction=0.5), replace(H100, free=60 * GIB))
    assert verdict.word == "fits"


def test_a_host_without_a_gpu_and_a_cache_of_a_size() -> None:
    host = Device("this host", 32 * GIB, 30 * GIB, is_cpu=True)
    wanted = Wanted(is_cpu=True, kv_bytes=4 * GIB, max_model_len=65536)
    model, held, found = counted(cases.LLAMA_8B, KNOWN[0].tensors, wanted)
    verdict = judge(Case(model, held, wanted), found, host)
    assert verdict.word == "too_long"
    assert [line.split(" in ")[0] for line in verdict.advice] == ["set serve.max_model_len: 32512", "or set VLLM_CPU_KVCACHE_SPACE: 9"]
    wanted = replace(wanted, max_model_len=16384)
    found = estimate(model, held, wanted)
    assert judge(Case(model, held, wanted), found, host).word == "fits"
    assert judge(Case(model, held, wanted), found, replace(host, free=8 * GIB)).word == "busy"


def test_without_a_size_the_engine_wants_its_whole_share_of_the_host_free() -> None:
    """vLLM's CPU build ends with "Available memory on node 0 (...) on startup is less than desired CPU memory utilization"."""
    wanted = Wanted(is_cpu=True, max_model_len=8192)
    model, held, found = counted(cases.LLAMA_8B, KNOWN[0].tensors, wanted)
    host = Device("this host", 32 * GIB, 28 * GIB, is_cpu=True)
    verdict = judge(Case(model, held, wanted), found, host)
    assert (verdict.word, verdict.what) == ("busy", "vLLM does not start unless 29.44 GiB (0.92 of this host) are free, whatever it needs of that, and 28.00 GiB are free now")
    assert [line.split(":")[0] for line in verdict.advice] == ["set VLLM_CPU_KVCACHE_SPACE", "free memory of the host", "or set serve.gpu_memory_utilization"]
    space = int(verdict.advice[0].split()[2])
    assert judge(Case(model, held, wanted), estimate(model, held, replace(wanted, kv_bytes=space * GIB)), host).word == "fits", "advice is tried before it is given"
    assert "VLLM_CPU" not in " ".join(judge(Case(model, held, wanted), found, replace(host, free=16 * GIB)).advice), "that would not be free either"


def test_nothing_to_compare_with() -> None:
    _, verdict = judged(KNOWN[0], Wanted(max_model_len=8192), None)
    assert (verdict.word, verdict.advice) == ("unknown", ())
    _, _, found = counted(cases.LLAMA_8B, KNOWN[0].tensors, Wanted(max_model_len=8192))
    assert smallest_gpu(found) == 24


def test_what_programs_are_told_is_documented() -> None:
    sized = size_up(Facts("here", cases.LLAMA_8B, tuple(KNOWN[0].tensors), 1, 1), Wanted(), H100, 1)
    page = (Path(__file__).parents[2] / "docs/sizing.md").read_text(encoding="utf-8")
    document = sizing_show.as_dict(sized)
    keys = [*document, *document["device"], *document["model"], *document["source"], *get_args(Word)]
    assert [key for key in keys if f"`{key}`" not in page] == []
    assert next(iter(sizing_show.verdict(sized))).startswith("fits: 32.68 GiB of 73.60 GiB; the KV cache has room for ")


# -- laws


models = st.builds(
    lambda kind, count, heads, size, span: Architecture(
        "M", "m", (Layer(kind, heads, size, span),) * count, 32, 1024, 4096, 32000, 32768, "bfloat16", is_tied=False
    ),
    st.sampled_from(["full", "window", "chunk", "mla"]), st.integers(1, 64), st.sampled_from([1, 2, 8]), st.sampled_from([64, 128, 256]), st.integers(1, 4096),
)  # fmt: skip
mixed = st.lists(st.sampled_from([Layer("full", 2, 128), Layer("window", 2, 128, 512), Layer("none"), Layer("state", state=4096)]), min_size=1, max_size=40).map(
    lambda layers: Architecture("M", "m", tuple(layers), 32, 1024, 4096, 32000, 32768, "bfloat16", is_tied=False)
)
wishes = st.builds(Wanted, tensor_parallel=st.sampled_from([1, 2, 4, 8]), kv_dtype=st.sampled_from(["", "fp8"]), batched_tokens=st.sampled_from([0, 512]), is_cpu=st.booleans())


@given(models | mixed, wishes, st.integers(1, 200_000), st.integers(0, 50_000))
def test_a_longer_request_never_takes_less(model: Architecture, wanted: Wanted, length: int, more: int) -> None:
    cache = sizing.cache_of(model.layers, model, wanted, "bfloat16")
    assert cache.bytes(length) <= cache.bytes(length + more)


@given(models, wishes, st.integers(1, 100_000), st.integers(2, 5))
def test_layers_count_alike(model: Architecture, wanted: Wanted, length: int, times: int) -> None:
    more = replace(model, layers=model.layers * times)
    one, many = (sizing.cache_of(each.layers, each, wanted, "bfloat16").bytes(length) for each in (model, more))
    assert many == times * one


@given(models | mixed, wishes, st.integers(1, 64 * GIB), st.integers(1, 300_000))
def test_the_longest_fits_and_one_more_does_not(model: Architecture, wanted: Wanted, available: int, limit: int) -> None:
    cache = sizing.cache_of(model.layers, model, wanted, "bfloat16")
    longest = cache.longest(available, limit)
    assert 0 <= longest <= limit
    assert longest == 0 or cache.bytes(longest) + cache.page <= available
    assert longest == limit or cache.bytes(longest + 1) + cache.page > available


@given(st.integers(1, 12), st.sampled_from([1, 2, 4, 8]), st.sampled_from(["llama", "qwen3_moe"]))
@settings(max_examples=30)
def test_weights_count_by_layers_and_more_gpus_never_hold_more_each(layers: int, parallel: int, family: str) -> None:
    more: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    sizes = []
    for count in (layers, layers + 1, layers + 2):
        words = synthetic_models.config(family, num_hidden_layers=count, **more)
        model, held, _ = counted(words, list(cases.tensors(words)))
        sizes.append(held.total)
        one, shared = weights.per_gpu(held, model, 1, 1)[0], weights.per_gpu(held, model, parallel, 1)[0]
        assert one / parallel <= shared <= one == held.total
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 1 << 70) | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5
)
KEYS = sorted({*cases.LLAMA_8B, *cases.DEEPSEEK_V3, *cases.GEMMA3_27B, *cases.QWEN3_NEXT, *cases.GPT_OSS_20B, "rope_scaling", "hybrid_override_pattern", "num_kv_shared_layers"})


@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=12), st.sampled_from([cases.LLAMA_8B, cases.GEMMA3_27B, cases.QWEN3_NEXT, cases.GPT_OSS_20B, {}]))
@settings(max_examples=300)
def test_no_config_json_is_too_odd(odd: dict[str, Any], base: dict[str, Any]) -> None:
    model = architecture.parse(json.loads(json.dumps(base)) | odd)
    held = weights.of_files(GIB, model)
    if len(model.layers) <= 200:
        found = estimate(model, held, Wanted(tensor_parallel=2, pipeline_parallel=2))
        judge(Case(model, held, found.wanted), found, H100, 2)
