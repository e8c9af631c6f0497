"""Runs in the engine's own Python: loads each model that stdin names, and says what it takes. One process, since the imports take longest.

The weights are counted when they are loaded, and before the CPU build packs them anew for its kernels: where the pages of those are, nothing tells, and
its log, unlike that of a GPU, has no line about them.

stdin: {"cases": [{"name", "model", "dtype", "length"}]}; the answers are lines beginning with SIZES.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

_loaded: list[int] = []


def _count_when_loaded() -> None:
    from vllm.model_executor.model_loader import base_loader  # type: ignore[import-not-found, unused-ignore]

    before = base_loader.process_weights_after_loading

    def counted(model: Any, *rest: Any, **more: Any) -> Any:
        parameters = {id(each): each for each in model.parameters()}.values()
        _loaded.append(sum(each.numel() * each.element_size() for each in parameters))
        return before(model, *rest, **more)

    base_loader.process_weights_after_loading = counted


def sizes(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    # The class has other defaults than the server: as many tokens in a step as that one's.
    fixed = {"skip_tokenizer_init": True, "enforce_eager": True, "max_num_batched_tokens": 2048}
    engine = LLM(case["model"], dtype=case["dtype"], max_model_len=case["length"], **fixed)
    config = engine.llm_engine.vllm_config.cache_config
    found = {"weights": _loaded.pop(), "tokens": config.kv_cache_size_tokens, "blocks": config.num_gpu_blocks, "block": config.block_size}
    engine.llm_engine.engine_core.shutdown()
    return found


def _inspect_here() -> None:
    """Each new family is looked at in a process of its own otherwise, which imports everything anew: 15 s, and 95 s on a busy machine."""
    from vllm.model_executor.models import registry  # type: ignore[import-not-found, unused-ignore]

    registry._LazyRegisteredModel.inspect_model_cls = lambda self: registry._ModelInfo.from_model_cls(self.load_model_cls())


def main() -> None:
    _count_when_loaded()
    _inspect_here()
    for case in json.load(sys.stdin)["cases"]:
        try:
            said = sizes(case)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print("SIZES", json.dumps({"name": case["name"], **said}), flush=True)
        gc.collect()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # type: ignore[import-not-found, unused-ignore]

        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
