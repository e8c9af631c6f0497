"""The estimate against the real vLLM: weights, and how many tokens its KV cache has room for, by its own account, within a tenth.

On the CPU build, which is what there is: what comes on top of both on a GPU cannot be shown here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import synthetic_models
from tests.engine.server import REAL_ENV
from vllmd.core.sizing import Wanted
from vllmd.models import demo, headers
from vllmd.preflight.sizing import Sized, size_up

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

GIB = 1 << 30
PROBE = Path(__file__).with_name("sizes_probe.py")
MLA = {
    "kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 8, "n_routed_experts": 4,
    "n_shared_experts": 1, "moe_intermediate_size": 256, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": []}
WINDOW = {"num_hidden_layers": 14, "tie_word_embeddings": True, "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 64}


@dataclass(frozen=True)
class Shape:
    """`stored` is the type in the files, `dtype` what the engine is told."""

    family: str
    length: int
    dtype: str = "auto"
    stored: str = "BF16"
    words: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        if self.family == "demo":
            return demo.make(directory)
        return synthetic_models.write(directory, synthetic_models.config(self.family, **self.words), self.stored, shards=2)


SHAPES = {
    "tiny": Shape("demo", 2048, "float32"),
    "gqa": Shape("llama", 4096, words={"num_hidden_layers": 8, "vocab_size": 5000}),
    "gqa-float32": Shape("llama", 4096, "float32", words={"num_key_value_heads": 4}),
    "tied-from-float32": Shape("qwen3", 8192, stored="F32", words={"tie_word_embeddings": True, "torch_dtype": "float32"}),
    "windows": Shape("gemma3_text", 8192, words=WINDOW),
    "experts": Shape("qwen3_moe", 4096, words=MOE),
    "latent": Shape("deepseek_v3", 4096, words=MLA),
}


@dataclass(frozen=True)
class Engine:
    """What the engine said of each, and the log that it said it in."""

    told: dict[str, dict[str, Any]]
    logged: list[int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sizes")
    return {name: shape.write(folder / name) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def engine(real_engine: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    home = tmp_path_factory.mktemp("home")
    asked = [{"name": name, "model": str(models[name]), "dtype": shape.dtype, "length": shape.length} for name, shape in SHAPES.items()]
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **REAL_ENV}
    with (home / "log").open("w+") as log:
        python = [str(real_engine.parent / "python3"), "-P", str(PROBE)]
        ended = subprocess.run(python, input=json.dumps({"cases": asked}), text=True, stdout=log, stderr=subprocess.STDOUT, env=env, timeout=240, check=False)
        log.seek(0)
        text = log.read()
    assert ended.returncode == 0, text[-3000:]
    found = [json.loads(line.partition("SIZES ")[2]) for line in text.splitlines() if line.startswith("SIZES ")]
    logged = [int(count.replace(",", "")) for count in re.findall(r"KV cache size: ([\d,]+) tokens", text)]
    return Engine({each.pop("name"): each for each in found}, logged)


def estimated(directory: Path, shape: Shape) -> Sized:
    dtype = "" if shape.dtype == "auto" else shape.dtype
    return size_up(headers.local(directory), Wanted(is_cpu=True, kv_bytes=GIB, dtype=dtype, max_model_len=shape.length), None)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_and_kv_cache_are_what_the_engine_tells(engine: Engine, models: dict[str, Path], name: str) -> None:
    told, sized = engine.told[name], estimated(models[name], SHAPES[name])
    assert "error" not in told, told["error"]
    tokens = sized.estimate.cache.tokens(GIB, SHAPES[name].length)
    sys.stdout.write(f"{name}: weights {sized.estimate.weights} estimated, {told['weights']} told; tokens {tokens} estimated, {told['tokens']} told\n")
    assert sized.estimate.weights == pytest.approx(told["weights"], rel=0.1)
    assert tokens == pytest.approx(told["tokens"], rel=0.1)
    assert told["tokens"] in engine.logged
    assert GIB // sized.estimate.cache.page == pytest.approx(told["blocks"], rel=0.1)
