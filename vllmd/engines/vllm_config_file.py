"""vLLM's `--config` file: the user's own, read as hostile input, and the private one that carries the API key.

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
from vllmd.errors import ConfigError, PermissionMissing

PRIVATE_NAME = "engine-config.yaml"
"""In the instance's runtime directory. vLLM insists on the ending .yaml."""

_CREDENTIAL = "api-key"
_KEY_LIMIT_BYTES = 4096
_UNFIT = "has a space or a character that is not printable ASCII, or begins with a dash"


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


def api_keys(setting: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Keys that clients may use; the first is the one to probe with. ConfigError, which never shows a key, on one that
    no HTTP header can carry or that vLLM's command line would take for a flag."""
    credential = _credential(environ)
    if _is_unfit(credential):
        raise ConfigError("bad_api_key", f"the credential {_CREDENTIAL} {_UNFIT}", "make another key")
    if _is_unfit(setting):
        raise SettingRefused("bad_api_key", "serve.api_key", _UNFIT, "make another key")
    return tuple(dict.fromkeys(key for key in (credential, setting) if key))


def _is_unfit(key: str) -> bool:
    return not key.isascii() or not key.isprintable() or " " in key or key.startswith("-")


def _credential(environ: Mapping[str, str]) -> str:
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    if not directory:
        return ""
    path = Path(directory, _CREDENTIAL)
    try:
        with open(path, "rb") as stream:
            return stream.read(_KEY_LIMIT_BYTES).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise PermissionMissing(
            "credential_unreadable", f"{path}: {error.strerror}", "check LoadCredential=api-key:... of the unit"
        ) from error
