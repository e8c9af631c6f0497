"""What an instance's own files say of its GPUs, without the choice that is about to be replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllmd.config import layers
from vllmd.config.given import BUILT_IN
from vllmd.config.layers import Loaded
from vllmd.config.paths import Paths
from vllmd.ctl import model_file
from vllmd.engines import registry
from vllmd.errors import ConfigError

_VLLM = "vllm"


@dataclass(frozen=True, slots=True)
class Wish:
    """`only`: the GPUs that it names (empty: none); `count`: how many it wants; `is_divided`: somebody has set a parallel size by hand."""

    loaded: Loaded
    only: tuple[str, ...] | None = None
    count: int | None = None
    is_divided: bool = False

    @property
    def speaks_of_gpus(self) -> bool:
        return self.only is not None or self.count is not None or self.is_divided


def tuning_for(name: str) -> type[Any]:
    return registry.get(name).tuning


def wish(paths: Paths, name: str, instance_text: str = "") -> Wish:
    """ConfigError where the files are not valid, or name another engine: presets are for vLLM."""
    with model_file.overlay(paths, name, "", instance_text) as there:
        loaded = layers.load(there, name, {}, {}, tuning_for)
    config, origins = loaded.config, loaded.origins
    if config.engine.name != _VLLM:
        raise ConfigError("not_vllm", f"{name} runs the engine {config.engine.name}, and presets are for vLLM", f"name the model in {paths.instance_config(name)}")
    divided = any(_is_set(origins, f"serve.{kind}_parallel_size") for kind in ("tensor", "pipeline", "data"))
    if config.gpus == "none":
        return Wish(loaded, only=(), is_divided=divided)
    if isinstance(config.gpus, int):
        return Wish(loaded, count=config.gpus, is_divided=divided) if config.gpus else Wish(loaded, only=(), is_divided=divided)
    return Wish(loaded, only=config.gpus if isinstance(config.gpus, tuple) else None, is_divided=divided)


def _is_set(origins: Mapping[str, Any], key: str) -> bool:
    return bool(origins.get(key, BUILT_IN) != BUILT_IN)
