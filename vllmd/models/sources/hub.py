"""The layout of a hub cache: HUB/models--ORG--NAME/{refs/BRANCH, snapshots/COMMIT/, blobs/}. Which snapshot is the model?"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from vllmd.core.model import ModelRequest
from vllmd.models.identity import hub_slug
from vllmd.models.places import is_real_directory
from vllmd.models.sources import Candidate
from vllmd.system.files import read_small

COMMIT = re.compile(r"[A-Za-z0-9._-]{1,100}", re.ASCII)


def candidates(hub: Path, request: ModelRequest) -> list[Candidate]:
    """Snapshots in order of preference. With a revision only that one; else refs/main's, then the others, newest first: a
    half-finished update must not take away the good snapshot before it."""
    repository = hub / hub_slug(request.key)
    snapshots = repository / "snapshots"
    if request.revision:
        return _revision(repository, snapshots, request.revision)
    newest = sorted(_directories(snapshots), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    main = _ref(repository, "main")
    newest.sort(key=lambda path: path.name != main)
    return [_candidate(path) for path in newest]


def _revision(repository: Path, snapshots: Path, revision: str) -> list[Candidate]:
    for commit in (revision, _ref(repository, revision)):
        path = snapshots / commit
        if COMMIT.fullmatch(commit) and commit not in (".", "..") and is_real_directory(path):
            return [_candidate(path)]
    return []


def _candidate(path: Path) -> Candidate:
    return Candidate(Path(os.path.realpath(path)), path.name)


def _directories(snapshots: Path) -> list[Path]:
    try:
        return [path for path in snapshots.iterdir() if is_real_directory(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _ref(repository: Path, name: str) -> str:
    """The commit that refs/NAME says; '' where there is none, or it says nonsense."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return ""
    try:
        text = read_small(repository.joinpath("refs", *parts), 200).decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.ENAMETOOLONG):
            return ""
        raise
    return text if COMMIT.fullmatch(text) else ""
