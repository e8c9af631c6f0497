"""Any S3-compatible store."""

from __future__ import annotations

from vllmd.core.plan import ModelRequest
from vllmd.models.sources import Context, Finding, Skipped


class S3:
    name = "r2"
    label = "R2"

    def find(self, request: ModelRequest, context: Context) -> Finding:
        if not context.settings.r2_bucket:
            return Skipped("R2_BUCKET not set")
        return Skipped(f"this version does not download; put {request.key} into {request.store}")
