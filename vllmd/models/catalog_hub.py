"""Hub caches as entries of a store's listing: HUB/models--ORG--NAME with its blobs, refs and snapshots."""

from __future__ import annotations

import os
from pathlib import Path

from vllmd.core.model import ModelRequest
from vllmd.models.places import is_real_directory
from vllmd.models.sources.hub import candidates

_PREFIX = "models--"


def repositories(root: Path) -> list[Path]:
    """OSError."""
    return sorted(path for path in root.iterdir() if is_repository(path)) if is_real_directory(root) else []


def is_repository(path: Path) -> bool:
    if not path.name.startswith(_PREFIX) or not is_real_directory(path):
        return False
    return any(is_real_directory(path / part) for part in ("snapshots", "blobs", "refs"))


def model_id(repository: Path) -> str:
    """`models--ORG--NAME` is ORG/NAME; a name may hold `--` too, which the layout does not tell apart."""
    name = repository.name.removeprefix(_PREFIX).replace("--", "/", 1)
    return "".join(char if char.isprintable() else "?" for char in name)


def snapshots(repository: Path) -> tuple[Path, ...]:
    """The newest first. OSError."""
    above = repository / "snapshots"
    found = [path for path in above.iterdir() if is_real_directory(path)] if is_real_directory(above) else []
    return tuple(sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True))


def revision(repository: Path) -> str:
    """The snapshot that a start would take: what refs/main says, else the newest; '' where there is none. OSError."""
    request = ModelRequest("", model_id(repository), "", "", (), repository.parent)
    found = candidates(repository.parent, request)
    return found[0].revision if found and found[0].revision.isprintable() else ""


def last_used(repository: Path, found: tuple[Path, ...]) -> float:
    """When a snapshot was made or a ref written, or a blob read, as far as the file system notes that. OSError."""
    times = [repository.stat().st_mtime, *(path.stat().st_mtime for path in found)]
    for name in ("refs", "blobs"):
        above = repository / name
        if is_real_directory(above):
            with os.scandir(above) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    times.append(max(status.st_mtime, status.st_atime))
    return max(times)


def unfinished_bytes(repository: Path) -> int:
    """What interrupted downloads of the hub's clients left. OSError."""
    blobs = repository / "blobs"
    if not is_real_directory(blobs):
        return 0
    with os.scandir(blobs) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries if entry.name.endswith(".incomplete"))
