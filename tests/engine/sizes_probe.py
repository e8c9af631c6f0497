"""Runs in the engine's own Python: loads each model that stdin names, and says what it takes. One process, since the imports take longest.

stdin: {"cases": [{"name", "model", "dtype", "length", "more": {...}}]}; the answers are lines beginning with SIZES.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any


def sizes(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    engine = LLM(case["model"], dtype=case["dtype"], max_model_len=case["length"], skip_tokenizer_init=True, enforce_eager=True, **case["more"])
    config = engine.llm_engine.vllm_config.cache_config
    weights = engine.apply_model(lambda model: sum(each.numel() * each.element_size() for each in {id(each): each for each in model.parameters()}.values()))
    found = {"weights": weights[0], "tokens": config.kv_cache_size_tokens, "blocks": config.num_gpu_blocks, "block": config.block_size}
    engine.llm_engine.engine_core.shutdown()
    return found


def main() -> None:
    for case in json.load(sys.stdin)["cases"]:
        try:
            said = sizes(case)
        except Exception as error:  # noqa: BLE001 - the others are still worth asking
            said = {"error": f"{type(error).__name__}: {error}"}
        print("SIZES", json.dumps({"name": case["name"], **said}), flush=True)
        gc.collect()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # type: ignore[import-not-found, unused-ignore]

        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
