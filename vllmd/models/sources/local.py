"""Directories of this host: what is published in the store, what the existing tools put there, and a user's own.

    path given                  that directory, wherever it is
    STORE/<slug>.<hash12>       a link to a published version, or a directory whose provenance file speaks for the model
    STORE/NAME.<hash12>         the same, as the existing tools name it
    STORE/NAME                  a user's own: only if no revision is asked, and no provenance speaks against it
"""

from __future__ import annotations

import os
from pathlib import Path

from vllmd.core.plan import ModelRequest
from vllmd.models import provenance
from vllmd.models.identity import hash12, label
from vllmd.models.places import is_directory, present
from vllmd.models.sources import Candidate, Context, Finding, Found, NotFound
from vllmd.models.store import PUBLISHED, published_target


class Local:
    name = "local"
    label = "local directory"

    def find(self, request: ModelRequest, context: Context) -> Finding:  # noqa: ARG002 - the settings say nothing more
        if request.path:
            return _given(Path(request.path))
        found: list[Candidate] = []
        reasons: list[str] = []
        for path in _hashed(request):
            _add(_hashed_reason(path, request), path, found, reasons)
        plain = request.store / request.name
        if request.name and present(plain):
            _add(_plain_reason(plain, request), plain, found, reasons)
        if not reasons and not found:
            return NotFound(f"no {request.name or label(request)} in {request.store}")
        return Found(tuple(found)) if found else NotFound("; ".join(reasons))


def _given(path: Path) -> Finding:
    if is_directory(path):
        return Found((Candidate(Path(os.path.realpath(path))),))
    return NotFound(f"{path} is no directory" if present(path) else f"{path} does not exist")


def _hashed(request: ModelRequest) -> list[Path]:
    named = f"{request.name}.{hash12(request.identity)}" if request.name else label(request)
    paths = [request.store / name for name in dict.fromkeys((label(request), named))]
    return [path for path in paths if present(path)]


def _add(reason: str, path: Path, found: list[Candidate], reasons: list[str]) -> None:
    if reason:
        reasons.append(f"{path} {reason}")
    else:
        found.append(Candidate(Path(os.path.realpath(path))))


def _hashed_reason(path: Path, request: ModelRequest) -> str:
    """Why a directory that is named for this very identity is not it; '' if it is."""
    if path.is_symlink():
        return "" if published_target(request.store, path) else f"is a link that does not lead into {PUBLISHED}"
    if not is_directory(path):
        return "is no directory"
    found = provenance.read(path)
    if found is None:
        return f"has no {provenance.FILE}: it is not known to be complete"
    mismatch = provenance.mismatch(found, request)
    return f"is not this model: in its provenance {mismatch}" if mismatch else ""


def _plain_reason(path: Path, request: ModelRequest) -> str:
    """Why STORE/NAME is not the model; '' if it is."""
    if request.revision:
        return f"exists, but says nothing of revision {request.revision}; give its path (model.path, VLLMD_MODEL_PATH) to use it all the same"
    if not is_directory(path):
        return "is no directory"
    target = published_target(request.store, path) if path.is_symlink() else None
    if target is not None:
        is_ours = target.parent.name.endswith(f".{hash12(request.identity)}")
        return "" if is_ours else f"is a link to another model, {target.parent.name}"
    found = provenance.read(path)
    mismatch = provenance.mismatch(found, request) if found is not None else ""
    return f"is not this model: in its provenance {mismatch}" if mismatch else ""
