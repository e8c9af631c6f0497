"""What supervisors have written for others to read: status.json (now) and last.json (how the last life ended)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.values import finite_json
from vllmd.system.files import read_below

_LIMIT_BYTES = 1 << 20
_NOT_INSTANCES = ("vllmd", "presets")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an instance does not serve: VllmdError as it was written down."""

    code: str
    what: str
    hint: str
    status: int


def read(base: Path, *names: str) -> dict[str, Any]:
    """The JSON object in base/names; {} when it is missing, not readable, too long or not an object. Below `base` everything may
    be of the service's making, and root reads it: no link is followed, nothing but a regular file opened."""
    try:
        value = finite_json(read_below(base, names, _LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def status(paths: Paths, name: str) -> dict[str, Any]:
    return read(paths.runtime, "i", name, "status.json")


def is_refused(paths: Paths, name: str) -> bool:
    """Whether there may be a status.json that we may not read."""
    place = paths.instance_runtime(name) / "status.json"
    try:
        os.stat(place)  # noqa: PTH116 - its own error says which
        return not os.access(place, os.R_OK)
    except OSError as error:
        return isinstance(error, PermissionError)


def last(paths: Paths, name: str) -> dict[str, Any]:
    return read(paths.state, "instances", name, "last.json")


def last_stamp(paths: Paths, name: str) -> tuple[int, int]:
    """Changes whenever last.json is written: tells this failure's record from an earlier one's."""
    try:
        found = (paths.instance_state(name) / "last.json").stat()
    except OSError:
        return (0, 0)
    return (found.st_ino, found.st_mtime_ns)


def problem(record: Mapping[str, Any]) -> Problem | None:
    """The error of a status.json or last.json, if it tells one."""
    error = record.get("error")
    if not isinstance(error, dict):
        return None
    status_number = error.get("status", record.get("status"))
    return Problem(
        code=text(error, "code"),
        what=text(error, "what"),
        hint=text(error, "hint"),
        status=status_number if isinstance(status_number, int) else 0,
    )


def text(record: Mapping[str, Any], *keys: str) -> str:
    """The string at the end of a path of keys; '' where it is missing."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""


def number(record: Mapping[str, Any], *keys: str) -> float | None:
    """None also for what is no finite number: Python's JSON knows NaN, and integers of any length."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        return None
    return float(value)


def moment(record: Mapping[str, Any], key: str) -> datetime | None:
    """A time written as ISO 8601 or as seconds since 1970."""
    seconds = number(record, key)
    try:
        if seconds is not None:
            return datetime.fromtimestamp(seconds).astimezone()
        return datetime.fromisoformat(text(record, key)).astimezone()
    except (ValueError, OverflowError, OSError):
        return None


def names(paths: Paths) -> list[str]:
    """Instances that have a configuration, or a supervisor that wrote its status."""
    configured = {path.stem for path in paths.config.glob("*.yaml")} - set(_NOT_INSTANCES)
    return sorted(configured | {path.parent.name for path in paths.runtime.glob("i/*/status.json")})
