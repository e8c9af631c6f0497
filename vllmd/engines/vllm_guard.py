"""The keys of a vLLM: by our own middleware on every path where it takes one (--middleware), else by its own few prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllmd.engines import given_keys
from vllmd.engines.guard import vllmd_guard
from vllmd.engines.protocol import Context

_FLAG = "--middleware"
_NAME = f"{vllmd_guard.__name__.rpartition('.')[2]}.{vllmd_guard.Guard.__name__}"
_DIRECTORY = Path(vllmd_guard.__file__).parent
"""Holds that one module, so as a PYTHONPATH it hides nothing of the engine's."""


def is_guarded(context: Context) -> bool:
    """A version whose flags are not known surely has this one: it is older than any that is supported."""
    flags = context.installed.flags
    return bool(context.access.guard_file) and (_FLAG in flags or not flags)


def arguments(context: Context) -> list[str]:
    """Last of all: the last one given is the outermost, and refuses before any other is asked."""
    return [_FLAG, _NAME] if is_guarded(context) else []


def environment(context: Context) -> dict[str, str]:
    return {"PYTHONPATH": str(_DIRECTORY), vllmd_guard.FILE_VARIABLE: context.access.guard_file} if is_guarded(context) else {}


def all_keys(context: Context) -> tuple[str, ...]:
    """Ours first."""
    access = context.access
    given = given_keys.api_keys(context.config.serve.api_key, context.environ)
    return tuple(dict.fromkeys(key for key in (access.internal_key, *given, *access.client_keys) if key))


def told(context: Context) -> tuple[str, ...]:
    """What vLLM itself is told: nothing where the middleware sees to it."""
    return () if is_guarded(context) else all_keys(context)


def headers(context: Context) -> Mapping[str, str]:
    keys = all_keys(context)
    return {"Authorization": f"Bearer {keys[0]}"} if keys else {}
