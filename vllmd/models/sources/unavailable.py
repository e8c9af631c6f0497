"""Sources that this version cannot use yet: they are known, so that a configuration that names them is right, and are skipped."""

from __future__ import annotations

from vllmd.core.plan import ModelRequest
from vllmd.models.sources import Context, Finding, Skipped


class R2:
    name = "r2"
    label = "R2"

    def find(self, request: ModelRequest, context: Context) -> Finding:
        if not context.settings.r2_bucket:
            return Skipped("R2_BUCKET not set")
        return Skipped(f"this version does not download; put {request.key} into {request.store}")


class Hub:
    name = "hf-hub"
    label = "Hugging Face Hub"

    def find(self, request: ModelRequest, context: Context) -> Finding:  # noqa: ARG002
        return Skipped(f"this version does not download; `hf download {request.key}` fills a hub cache that is looked into")
