"""Where a start would take a model from, as far as this host knows: for people, before anything is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.models import sources
from vllmd.models.sources import Context, Found

WORDS = {"bundled": "bundled", "local": "local", "hf-cache": "in a hub cache", "r2": "downloaded", "hf-hub": "downloaded"}
"""What a model is, by the source that it comes from."""


def whereabouts(request: ModelRequest, settings: Model, environ: Mapping[str, str]) -> str:
    """One line. Looks at names only: no network is asked, nothing is validated, no lock is taken."""
    context = Context(dataclasses.replace(settings, offline=True), environ)
    later: list[str] = []
    for name in ("local",) if request.path else request.sources:
        if name in sources.NETWORK:
            later += [] if settings.offline or (name == "r2" and not settings.r2_bucket) else [name]
            continue
        directory = _first(name, request, context)
        if directory is not None and not later:
            return f"{WORDS[name]}, in {directory}"
        if directory is not None:
            return f"asked of {', '.join(later)} first; {WORDS[name]}, in {directory}"
    return f"not here; will be downloaded if {' or '.join(later)} has it" if later else "not here, and no network source is to be asked"


def directory(request: ModelRequest, settings: Model, environ: Mapping[str, str]) -> Path | None:
    """The first place on this host that should hold it, whatever a start would ask before; None where it is not here."""
    context = Context(dataclasses.replace(settings, offline=True), environ)
    names = [name for name in (("local",) if request.path else request.sources) if name not in sources.NETWORK]
    return next((found for name in names if (found := _first(name, request, context)) is not None), None)


def _first(name: str, request: ModelRequest, context: Context) -> Path | None:
    try:
        finding = sources.get(name).find(request, context)
    except (OSError, ValueError):
        return None  # the start will say it; ValueError: a name that this encoding of file names cannot say
    return finding.candidates[0].directory if isinstance(finding, Found) else None
