"""Where a model can come from: one file per source, made known by one line here, imported when it is first asked.

A source answers `find`: candidates on this host in order of preference, or what it offers over a network (models/remote), or
why it has none. It does not judge them: resolve validates each and takes the first that is whole; obtain fetches what is
offered.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest

if TYPE_CHECKING:
    from vllmd.models.remote import Listing, Transport

_REGISTRY = {
    "bundled": "vllmd.models.sources.bundled:Bundled",
    "local": "vllmd.models.sources.local:Local",
    "hf-cache": "vllmd.models.sources.hf_cache:HubCache",
    "r2": "vllmd.models.sources.s3:S3",
    "hf-hub": "vllmd.models.sources.hf_hub:Hub",
}
NETWORK = frozenset({"r2", "hf-hub"})
"""These are not asked when `model.offline` is set."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a source decides from, besides the request."""

    settings: Model
    environ: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory that should hold the model. `directory` is a real path; `revision` the commit where known; `warning` what a
    person should know if it is taken; `sealed_ns` when all that it had was validated (`published.sealed_ns`), 0 for never."""

    directory: Path
    revision: str = ""
    warning: str = ""
    sealed_ns: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class NotFound:
    reason: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """Not asked: not set up, or not in this version. Never a failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class Offered:
    """A network source has it: what, and how to ask for the bytes. models/obtain does the rest."""

    listing: Listing
    transport: Transport


Finding = Found | Offered | NotFound | Skipped


class Source(Protocol):
    name: str
    label: str
    """For people, after 'Checking '."""

    def find(self, request: ModelRequest, context: Context) -> Finding:
        """Looks, changes nothing. OSError where a place cannot be read; SourceUnavailable where a network source is worth asking
        again; any other VllmdError where it refuses (PermissionMissing, with what to do)."""


def get(name: str) -> Source:
    """The source of this name. KeyError for one that nobody made."""
    module, _, attribute = _REGISTRY[name].partition(":")
    return cast("Source", getattr(importlib.import_module(module), attribute)())


def names() -> tuple[str, ...]:
    return tuple(_REGISTRY)
