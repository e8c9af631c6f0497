"""Where a model can come from: one file per source, made known by one line here, imported when it is first asked.

A source answers `find`: candidates in order of preference, or why it has none. It does not judge them: resolve validates
each and takes the first that is whole. A source that downloads will also have a `fetch`; resolve knows nothing of networks.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from vllmd.config.settings import Model
from vllmd.core.plan import ModelRequest

_REGISTRY = {
    "bundled": "vllmd.models.sources.bundled:Bundled",
    "local": "vllmd.models.sources.local:Local",
    "hf-cache": "vllmd.models.sources.hf_cache:HubCache",
    "r2": "vllmd.models.sources.unavailable:R2",
    "hf-hub": "vllmd.models.sources.unavailable:Hub",
}


@dataclass(frozen=True, slots=True)
class Context:
    """What a source decides from, besides the request."""

    settings: Model
    environ: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory that should hold the model. `directory` is a real path; `revision` the commit where known."""

    directory: Path
    revision: str = ""


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


Finding = Found | NotFound | Skipped


class Source(Protocol):
    name: str
    label: str
    """For people, after 'Checking '."""

    def find(self, request: ModelRequest, context: Context) -> Finding:
        """Looks, changes nothing. OSError where a place cannot be read."""


def get(name: str) -> Source:
    """The source of this name. KeyError for one that nobody made."""
    module, _, attribute = _REGISTRY[name].partition(":")
    return cast("Source", getattr(importlib.import_module(module), attribute)())


def names() -> tuple[str, ...]:
    return tuple(_REGISTRY)
