"""What a model is for, read from its own files: decides which request proves that it lives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LIMIT_BYTES = 4_000_000

_SUFFIXES: tuple[tuple[str, str], ...] = (
    ("ForCausalLM", "generate"),
    ("ForConditionalGeneration", "generate"),
    ("ChatModel", "generate"),
    ("LMHeadModel", "generate"),
    ("ForTextEncoding", "embed"),
    ("EmbeddingModel", "embed"),
    ("Classification", "score"),
    ("ClassificationModel", "score"),
    ("ForRewardModel", "embed"),
    ("ForRewardModeling", "embed"),
    ("RewardModel", "embed"),
    ("Model", "embed"),
)
"""End of an architecture's name -> task; the first that fits, as vLLM's own table (vllm/config/model.py)."""

_SPEECH = ("Whisper", "CohereAsr", "Moonshine")
"""Architectures that only transcribe; others (Voxtral, ...) also generate text from text."""


def task_of(model: Path, arguments: Mapping[str, Any]) -> str:
    """generate, embed, score or transcribe; `arguments` are the engine's, by dashed name without the leading dashes."""
    forced = _forced(arguments)
    if forced:
        return forced
    architectures = _architectures(model)
    if any(name.startswith(_SPEECH) for name in architectures):
        return "transcribe"
    found = next((task for name in architectures for suffix, task in _SUFFIXES if name.endswith(suffix)), "generate")
    pooled = arguments.get("runner") == "pooling" or _pools(
        model
    )  # sentence-transformers models often are a ForCausalLM
    if found == "generate" and pooled:
        return "embed"
    return found


def _forced(arguments: Mapping[str, Any]) -> str:
    """--convert and --runner (and --task before 0.11) say it."""
    said = (str(arguments.get(name, "")) for name in ("convert", "runner", "task"))
    words = {
        "embed": "embed",
        "embedding": "embed",
        "classify": "score",
        "score": "score",
        "reward": "embed",
        "generate": "generate",
        "transcription": "transcribe",
    }
    return next((words[word] for word in said if word in words), "")


def _architectures(model: Path) -> list[str]:
    config = _json(model / "config.json")
    names = config.get("architectures") if isinstance(config, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _pools(model: Path) -> bool:
    modules = _json(model / "modules.json")
    return isinstance(modules, list) and any(
        isinstance(item, dict) and str(item.get("type", "")).endswith(".Pooling") for item in modules
    )


def _json(path: Path) -> Any:
    """None where there is no such file or it is not JSON: validation says so elsewhere, better."""
    try:
        with open(path, "rb") as stream:
            return json.loads(stream.read(_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


def has_chat_template(model: Path) -> bool:
    """Whether the tokenizer brings one."""
    if (model / "chat_template.jinja").is_file() or (model / "chat_template.json").is_file():
        return True
    settings = _json(model / "tokenizer_config.json")
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
