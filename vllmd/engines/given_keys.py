"""API keys that a person gives: serve.api_key (VLLM_API_KEY), and the systemd credential `api-key`. They hold beside those that
`vllmctl api-key` makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllmd.engines.protocol import SettingRefused
from vllmd.errors import ConfigError, PermissionMissing

_CREDENTIAL = "api-key"
_KEY_LIMIT_BYTES = 4096
_LONGEST = 512
_UNFIT = f"has a space or a character that is not printable ASCII, begins with a dash, or is longer than {_LONGEST} characters"


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
    return not key.isascii() or not key.isprintable() or " " in key or key.startswith("-") or len(key) > _LONGEST


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
