"""Directories of this host: what is published in the store, what the existing tools put there, and a user's own.

    path given                  that directory, wherever it is
    STORE/<slug>.<hash12>       a link to a published version that is whole by its manifest, or a directory whose provenance file
                                speaks for the model
    STORE/NAME.<hash12>         the same, as the existing tools name it
    STORE/NAME                  a user's own: only if no revision is asked, and no provenance speaks against it
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.errors import ConfigError
from vllmd.models import provenance
from vllmd.models.identity import hash12, label
from vllmd.models.places import is_directory, present
from vllmd.models.published import fault, manifest_of, sealed_ns
from vllmd.models.sources import Candidate, Context, Finding, Found, NotFound, hub_revision
from vllmd.models.store import PUBLISHED, published_target

HUBS = ("hf-hub", "hf-cache")
"""Sources for which model.require_revision speaks."""


class Local:
    name = "local"
    label = "local directory"

    def find(self, request: ModelRequest, context: Context) -> Finding:
        if request.path:
            return _given(Path(request.path))
        looked = _Looked(request, context.settings)
        for path in _hashed(request):
            looked.at(path, _hashed_reason(path, request))
        plain = request.store / request.name
        if request.name and present(plain):
            looked.at(plain, _plain_reason(plain, request))
        return looked.finding()


@dataclass(slots=True)
class _Looked:
    """What was found so far. Several links lead to one published version."""

    request: ModelRequest
    settings: Model
    found: list[Candidate] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    versions: set[Path] = field(default_factory=set)
    refused: list[ConfigError] = field(default_factory=list)

    def at(self, path: Path, reason: str) -> None:
        """A place, and why it is not the model ('' if it is)."""
        if reason:
            self.reasons.append(f"{path} {reason}")
            return
        version = published_target(self.request.store, path) if path.is_symlink() else None
        if version is None:
            self.found.append(Candidate(Path(os.path.realpath(path))))
        elif version not in self.versions:
            self.versions.add(version)
            self._published(version)

    def _published(self, directory: Path) -> None:
        """Without a manifest it is judged like any directory: state of our own never stops a start."""
        contents = manifest_of(directory)
        if contents is None:
            self.found.append(Candidate(directory, warning=f"{directory} has no manifest that can be read: only its headers are checked"))
        elif reason := fault(directory, contents):
            self.reasons.append(f"{directory} {reason}")
        elif self._is_allowed(contents.source):
            self.found.append(Candidate(directory, contents.revision, sealed_ns=sealed_ns(directory)))

    def _is_allowed(self, source: str) -> bool:
        """What a hub once gave is no more fixed for lying here: the policy may be younger than the version."""
        if source in HUBS:
            try:
                hub_revision.require(self.request, self.settings)
            except ConfigError as error:
                self.refused.append(error)
                return False
        return True

    def finding(self) -> Finding:
        if self.found:
            return Found(tuple(self.found))
        if self.refused:
            raise self.refused[0]
        store, request = self.request.store, self.request
        return NotFound("; ".join(self.reasons) or f"no {request.name or label(request)} in {store}")


def _given(path: Path) -> Finding:
    if is_directory(path):
        return Found((Candidate(Path(os.path.realpath(path))),))
    return NotFound(f"{path} is no directory" if present(path) else f"{path} does not exist")


def _hashed(request: ModelRequest) -> list[Path]:
    named = f"{request.name}.{hash12(request.identity)}" if request.name else label(request)
    paths = [request.store / name for name in dict.fromkeys((label(request), named))]
    return [path for path in paths if present(path)]


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
