"""The Hugging Face Hub, or a mirror of it."""

from __future__ import annotations

from vllmd.core.plan import ModelRequest
from vllmd.models.sources import Context, Finding, Skipped


class Hub:
    name = "hf-hub"
    label = "Hugging Face Hub"

    def find(self, request: ModelRequest, context: Context) -> Finding:  # noqa: ARG002
        return Skipped(f"this version does not download; `hf download {request.key}` fills a hub cache that is looked into")
