"""Is there room for what is to be fetched? Asked before the first byte: a disk that fills up after an hour helps nobody."""

from __future__ import annotations

import os
from pathlib import Path

from vllmd.errors import StorageFailed
from vllmd.models.amounts import size

RESERVE_BYTES = 64 << 20
"""What else a host needs while the last files arrive."""
RESERVE_INODES = 64


def check(directory: Path, needed_bytes: int, needed_files: int) -> None:
    """StorageFailed with both figures where the file system of `directory` has less room than that. OSError."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if needed_bytes + RESERVE_BYTES > free:
        what = f"{directory}: {size(needed_bytes)} are to be fetched, {size(free)} are free"
        raise StorageFailed("disk_full", what, f"Free {size(needed_bytes + RESERVE_BYTES - free)} there (`vllmctl store gc`, `vllmctl store list`), or set model.dir.")
    if found.f_files and needed_files + RESERVE_INODES > found.f_favail:
        what = f"{directory}: {needed_files} files are to be made, {found.f_favail} inodes are free"
        raise StorageFailed("disk_full", what, "Remove files there; `df -i` shows the inodes.")
