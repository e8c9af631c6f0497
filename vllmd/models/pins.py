"""Versions that somebody wants to keep: STORE/.pins/<manifest sha256>, with who pinned it and when.

The name of the file is what counts: one whose content is damaged pins all the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from vllmd.models.ioerrors import user_name
from vllmd.models.lock import private_directory
from vllmd.system.files import read_small, write_atomic

DIRECTORY = ".pins"
LIMIT_BYTES = 4096
SCHEMA = 1
_SUM = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Pin:
    """`at` is UTC, ISO 8601; all are '' where the file does not say."""

    label: str = ""
    at: str = ""
    by: str = ""


def pinned(store: Path) -> frozenset[str]:
    """The manifest sums of all pinned versions. OSError."""
    try:
        with os.scandir(store / DIRECTORY) as entries:
            return frozenset(entry.name for entry in entries if _SUM.fullmatch(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def read(store: Path, manifest_sha256: str) -> Pin | None:
    """What was noted of a pin; None where there is none. OSError."""
    if manifest_sha256 not in pinned(store):
        return None
    try:
        found = json.loads(read_small(store / DIRECTORY / manifest_sha256, LIMIT_BYTES).decode("utf-8"))
        return Pin(*(_text(found, key) for key in ("label", "at", "by")))
    except (ValueError, RecursionError, OSError):
        return Pin()


def _text(found: object, key: str) -> str:
    value = found.get(key) if isinstance(found, Mapping) else None
    return value if isinstance(value, str) and value.isprintable() else ""


def pin(store: Path, directory: Path) -> bool:
    """Keep a published version whatever comes after it; False where that is so already. OSError, PermissionMissing."""
    if directory.name in pinned(store):
        return False
    noted = Pin(directory.parent.name, datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"), _who())
    path = private_directory(store, DIRECTORY) / directory.name
    write_atomic(path, json.dumps({"schema": SCHEMA, **asdict(noted)}) + "\n")
    return True


def unpin(store: Path, manifest_sha256: str) -> bool:
    """False where it was not pinned. OSError, PermissionMissing."""
    if manifest_sha256 not in pinned(store):
        return False
    (private_directory(store, DIRECTORY) / manifest_sha256).unlink(missing_ok=True)
    return True


def _who() -> str:
    """Who asked: sudo's own word for the person behind root, where there is one."""
    person = os.environ.get("SUDO_USER", "")
    return person if person and person.isprintable() and os.getuid() == 0 else user_name()
