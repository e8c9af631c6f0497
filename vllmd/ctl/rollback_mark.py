"""A rollback exchanges several files. While it does, a mark holds the sums of what they shall be, so that one which was cut short is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vllmd.config.paths import Paths
from vllmd.instance.generations import BEFORE, FILES_FOLDER, RECORD_BYTES, Kept, kept_files, present_files, sums_of
from vllmd.system.files import read_small, write_atomic


def _mark(paths: Paths, instance: str) -> Path:
    return paths.config / FILES_FOLDER / instance / ".begun"


def begun(paths: Paths, instance: str, files: Mapping[str, Kept]) -> None:
    """After `before` was put aside. OSError."""
    write_atomic(_mark(paths, instance), json.dumps(sums_of(files)), mode=0o600)


def done(paths: Paths, instance: str) -> None:
    _mark(paths, instance).unlink(missing_ok=True)


def is_half_way(paths: Paths, instance: str) -> bool:
    """Whether each file of now is either as it was before a rollback that did not end, or as that one wanted it. OSError."""
    try:
        wanted = json.loads(read_small(_mark(paths, instance), RECORD_BYTES))
    except (FileNotFoundError, ValueError):
        return False
    before, now = (sums_of(files) for files in (kept_files(paths, instance, BEFORE), present_files(paths, instance)))
    return bool(before) and all(now.get(name) in (before.get(name), wanted.get(name)) for name in {*before, *wanted, *now})
