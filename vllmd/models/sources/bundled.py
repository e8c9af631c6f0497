"""Models that came with the environment itself, read-only: the hub cache in $FLOX_ENV/share/models."""

from __future__ import annotations

from pathlib import Path

from vllmd.core.model import ModelRequest
from vllmd.models.sources import Context, Finding, Found, NotFound, Skipped, hub


class Bundled:
    name = "bundled"
    label = "bundled models"

    def find(self, request: ModelRequest, context: Context) -> Finding:
        if not context.settings.flox_env:
            return Skipped("FLOX_ENV not set")
        root = Path(context.settings.flox_env, "share/models/hub")
        found = hub.candidates(root, request)
        return Found(tuple(found)) if found else NotFound(f"no usable snapshot in {root}")
