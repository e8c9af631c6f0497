"""Stages of downloads that nobody went on with: STORE/.staging/<label>/ and its log."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vllmd.models import durable, retention
from vllmd.models.ioerrors import explained
from vllmd.models.places import is_real_directory
from vllmd.models.retention import InUse, Removed

STAGING = ".staging"
STALE_S = 7 * 86400.0
_LABEL = re.compile(r"(.+\.[0-9a-f]{12})(\.log)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Stale:
    """`paths` are the stage and its log, whichever are there. `age_s` since anything in them was written."""

    label: str
    paths: tuple[Path, ...]
    bytes: int
    age_s: float


def stale_stages(store: Path, older_s: float = STALE_S) -> list[Stale]:
    """Those that nothing was written to for that long; whether one is worked on is seen when it is removed. What a clock
    set back made younger than now is not stale. OSError."""
    by_label: dict[str, list[Path]] = {}
    directory = store / STAGING
    for path in sorted(directory.iterdir()) if is_real_directory(directory) else ():
        if match := _LABEL.fullmatch(path.name):
            by_label.setdefault(match[1], []).append(path)
    found = [_stale(label, paths) for label, paths in by_label.items()]
    return [stale for stale in found if stale.age_s > older_s]


def _stale(label: str, paths: list[Path]) -> Stale:
    newest, total = 0.0, 0
    for path in paths:
        for each in (path, *(durable.files(path) if is_real_directory(path) else ())):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, each.lstat().st_mtime)
        with contextlib.suppress(FileNotFoundError):
            total += retention.size(path) if is_real_directory(path) else path.lstat().st_size
    return Stale(label, tuple(paths), total, time.time() - newest)


def remove_stage(store: Path, stale: Stale) -> Removed | InUse:
    """Remove it unless its model is being resolved. StorageFailed, PermissionMissing."""
    where = store / STAGING / stale.label
    with explained(f"remove {where}"), ExitStack() as stack:
        if problem := retention.lock_label(store, stale.label, stack):
            return InUse(where, problem)
        for path in stale.paths:
            if is_real_directory(path):
                shutil.rmtree(retention.discard(store, path), ignore_errors=True)
            elif os.path.lexists(path):
                path.unlink()
        return Removed(where, stale.bytes)
