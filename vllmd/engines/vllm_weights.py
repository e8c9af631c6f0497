"""Formats of weights that an installed vLLM does not load: said before it is started, not 30 s later by a traceback."""

from __future__ import annotations

from pathlib import Path

from vllmd.errors import ModelInvalid

_LOADERS = ("vllm/model_executor/model_loader/gguf_loader.py", "vllm_gguf_plugin")
"""What loads GGUF: vLLM itself before 0.24, a plug-in of its project since then."""
_LOADED = {".safetensors", ".bin", ".pt", ".pth"}


def check(directory: Path, executable: str, version: str) -> None:
    """ModelInvalid where GGUF is all there is, and nothing that loads it. What cannot be told is left to the engine. OSError."""
    kinds = {path.suffix for path in directory.iterdir()}
    packages = sorted((Path(executable).parent.parent / "lib").glob("python3*/site-packages/vllm"))
    if not packages or ".gguf" not in kinds or kinds & _LOADED:
        return
    if not any((packages[0].parent / place).exists() for place in _LOADERS):
        hint = "Take the model as safetensors: the original one, or its FP8, AWQ or NVFP4 variant. vLLM's own plug-in for GGUF (vllm-gguf-plugin) is not in this engine."
        raise ModelInvalid("weights_unsupported", f"{directory}: its weights are GGUF, which vLLM {version} does not load".replace("  ", " "), hint)
