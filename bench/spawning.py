"""From exec of `vllmd run` to exec of the engine, beside the commands that people chain with && for the same."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bench import group
from bench.place import Place
from bench.table import Figure, compared

BAR_S = 0.5
STARTS = 25


def run() -> list[Figure]:
    with Place(cgroup=group.available()) as place:
        _vllmd(place)  # the first one reads everything from the disk, and is not counted
        measured = [_vllmd(place) for _ in range(STARTS)]
        place.write_config({"gpus": "all"})
        checked = [_vllmd(place) for _ in range(STARTS)]
        alone = [_alone(place) for _ in range(STARTS)]
        chained = [_chain(place) for _ in range(5)]
    others = f"{compared('vllm-preflight && vllm-resolve-model && vllm-serve', chained)}; {compared('the engine alone', alone)}"
    return [
        Figure("exec of `vllmd run` to exec of the engine", measured, bar=BAR_S, against=others),
        Figure("  the same with the GPU check", checked, bar=BAR_S, against="gpus: all, as this machine has them"),
    ]


def _vllmd(place: Place) -> float:
    began = place.start()
    born = place.stamp("born")
    place.ready_at()
    place.stop()
    return born - began


def _alone(place: Place) -> float:
    with place.alone() as began:
        return place.stamp("born") - began


def _chain(place: Place) -> float:
    """As today: configured by environment alone, one process after the other; the last becomes the engine."""
    env = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "VLLMD_ENGINE_EXECUTABLE": str(place.engine),
        "VLLMD_ENGINE_ENV": json.dumps(place.engine_env),
        "VLLM_MODEL": place.model.name,
        "VLLM_MODEL_ORG": "bench",
        "VLLM_MODELS_DIR": str(place.root),
        "VLLM_MODEL_ENV_FILE": str(place.root / "model.env"),
        "VLLM_SERVED_MODEL_NAME": "tiny",
        "VLLM_TENSOR_PARALLEL_SIZE": "1",
        "VLLM_PIPELINE_PARALLEL_SIZE": "1",
        "VLLM_MAX_MODEL_LEN": "2048",
        "VLLM_MAX_NUM_BATCHED_TOKENS": "2048",
        "VLLM_KV_CACHE_DTYPE": "auto",
        "VLLM_PORT": str(place.port),
        "VLLM_SKIP_GPU_CHECK": "1",
        "VLLM_PREFLIGHT_LOCKFILE": str(place.root / "preflight.lock"),
    }
    script = "vllm-preflight && vllm-resolve-model && exec vllm-serve"
    with place.alone(["/bin/sh", "-c", script], env) as began:
        return place.stamp("born") - began
