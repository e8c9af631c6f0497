"""vLLM's `--config` file: the user's own, read as hostile input, and the private one that carries the API keys of a vLLM that
has no --middleware, and of `vllmd serve`.

A key in a 0600 file is visible nowhere; on the command line it is visible to every user, in the environment to every
process of the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmd.core.plan import Installed
from vllmd.engines import vllm_flags
from vllmd.engines.protocol import SettingRefused

PRIVATE_NAME = "engine-config.yaml"
"""In the instance's runtime directory. vLLM insists on the ending .yaml."""


def read(path: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The file's entries, and 'FILE:LINE' of each. ConfigError where it is missing, unreadable or not a mapping."""
    from vllmd.config import yamlfile  # PyYAML costs 20 ms, and few instances have such a file

    try:
        document = yamlfile.load(Path(path))
    except FileNotFoundError:
        raise SettingRefused(
            "engine_config_missing",
            "engine.config_file",
            f"there is no {path}",
            "correct engine.config_file (VLLM_CONFIG_FILE) or remove it",
        ) from None
    return document.values, {key: f"{path}:{document.line(key)}" for key in document.values}


def without_owned(entries: Mapping[str, Any], installed: Installed) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if not vllm_flags.owner(vllm_flags.dashed(key), installed)}


def text(entries: Mapping[str, Any], api_keys: tuple[str, ...]) -> str:
    import yaml  # as above

    merged = _plain(entries)
    if api_keys:
        merged["api-key"] = list(api_keys)
    return yaml.safe_dump(merged, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
