"""The engine's environment: built from an allow list, not inherited. Pure.

What a service manager, a shell profile or a container platform leaves in an environment bends a Python program in ways
nobody looks for: a PYTHONPATH to other packages, a NOTIFY_SOCKET that it answers in our name, Kubernetes' VLLM_PORT=tcp://...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllmd.config import settings

_NAMES = frozenset({"PATH", "HOME", "LANG", "TZ", "http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"})
_PREFIXES = (
    "LC_",
    "SSL_CERT_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "GLOO_",
    "UCX_",
    "TORCH",
    "TRITON_",
    "OMP_",
    "MKL_",
    "HF_",
    "VLLM_",
)

NEVER = frozenset({"PYTHONPATH", "PYTHONHOME", "LD_PRELOAD", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "VLLM_API_KEY"})
_NEVER_PREFIXES = ("WATCHDOG_", "LISTEN_")

_SECRET_ENDS = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "SECRET_KEY", "ACCESS_KEY", "CREDENTIALS")

_OLD_NAMES = frozenset(
    {
        "VLLM_RESET_CACHE",
        "VLLM_GPU_DEVICES",
        "VLLM_SCRAPE_HOST",
        "VLLM_PREFLIGHT_PROXY_CHILD",
        "VLLM_START_BIND_TIMEOUT",
        "VLLM_START_BIND_POLL",
    }
)
"""Names of the runtimes before vllmd that are no setting any more; vLLM warns about every VLLM_* name that it does not know."""

_SECTIONS = (
    settings.Model,
    settings.Serve,
    settings.EngineChoice,
    settings.Preflight,
    settings.Start,
    settings.Stop,
    settings.Watch,
    settings.Log,
    settings.Metrics,
    settings.Config,
)


def our_names(tuning: type[Any]) -> frozenset[str]:
    """Every environment name that is a setting of vllmd or of the plug-in: none of them is meant for the engine."""
    found = [row for section in (*_SECTIONS, tuning) for _, _, _, row in settings.rows(section, "")]
    return frozenset(name for row in found for name in (row.env, *row.aliases)) | _OLD_NAMES


def is_never_passed(name: str) -> bool:
    return name in NEVER or name.startswith(_NEVER_PREFIXES)


def is_secret(name: str) -> bool:
    """A name whose value is not to be shown. By its end: VLLM_..._TOKEN_THRESHOLD is about tokens of text."""
    return name.startswith("HF_TOKEN") or name.upper().endswith(_SECRET_ENDS)


def build(
    environ: Mapping[str, str],
    *,
    ours: frozenset[str],
    given: Mapping[str, str],
    defaults: Mapping[str, str],
    fixed: Mapping[str, str],
    path_first: str = "",
    tokens: bool = False,
) -> dict[str, str]:
    """defaults < what is allowed of `environ` < `fixed` < `given` (the user's engine.env), in this order of precedence.

    `path_first` is put before PATH (an engine looks for its own ninja there); `tokens` lets a hub's tokens through, for
    a model that the engine itself still has to fetch.
    """
    allowed = {
        name: value for name, value in environ.items() if _is_allowed(name, ours) and (tokens or not is_secret(name))
    }
    built = {**defaults, **allowed, **fixed, **given}
    built["PATH"] = ":".join(part for part in (path_first, built.get("PATH") or "/usr/local/bin:/usr/bin:/bin") if part)
    if built.get("HOME", "/") in ("", "/", "/nonexistent") and "HOME" in defaults:
        built["HOME"] = defaults["HOME"]
    return {name: value for name, value in built.items() if not is_never_passed(name)}


def _is_allowed(name: str, ours: frozenset[str]) -> bool:
    if name in ours or is_never_passed(name):
        return False
    return name in _NAMES or (name.lower() in _NAMES and name.lower().endswith("_proxy")) or name.startswith(_PREFIXES)


def visible_devices(gpus: str | int | tuple[str, ...], inherited: str | None) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for the instance's GPUs; {} leaves it to what is inherited. A number takes the first of
    those that the supervisor itself was given."""
    if gpus == "all":
        return {}
    if gpus == "none":
        return {"CUDA_VISIBLE_DEVICES": ""}
    if isinstance(gpus, int):
        given = [item for item in (inherited or "").split(",") if item]
        return {"CUDA_VISIBLE_DEVICES": ",".join(_first(given, gpus))}
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def _first(given: list[str], count: int) -> Iterable[str]:
    return given[:count] if given else (str(index) for index in range(count))
