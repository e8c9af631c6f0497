"""Any S3-compatible store (R2, AWS, MinIO, Ceph, ...): `s3://BUCKET/PREFIX/NAME/` holds the files of the model.

botocore brings the configuration, the credentials, the listing and the signatures; the bytes are moved by models/download.
A revision is no part of the path, as in the existing tools: whoever keeps several gives each its own prefix
(model.r2_object_prefix). Nothing but the bucket is ever asked: no STS, which R2 does not have.

    s3_direct    the usual case, without the rest: keys in the environment, an endpoint, one page
    s3_signature its signatures
    s3_store     settings, environment and credentials -> a client that only asks for what it may
    s3_http      one answer of the store: bounded in size and time, and looked at before any XML parser does
    s3_listing   ListObjectsV2, page by page -> Listing
    s3_transport Listing -> signed requests for pieces, and the store's sums
    s3_errors    what the store or botocore says -> our errors
"""

from __future__ import annotations

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.models.sources import Context, Finding, NotFound, Offered, Skipped


class S3:
    name = "r2"
    label = "R2"

    def find(self, request: ModelRequest, context: Context) -> Finding:
        if not context.settings.r2_bucket:
            return Skipped("R2_BUCKET not set")
        if context.settings.offline:
            return Skipped("offline")
        # Imported here: they are of no use to the many who have no bucket.
        from vllmd.models.sources import s3_direct, s3_listing, s3_store, s3_transport

        prefix = key_prefix(context.settings, request)
        direct = s3_direct.asked(context.settings, prefix, context.environ)
        if direct is not None:
            return Offered(direct.listing, direct.transport)
        store = s3_store.opened(context.settings, prefix, context.environ)
        with store.quiet():
            found = s3_listing.listed(store)
            if not found.listing.files:
                return NotFound(f"nothing in {store.place.origin}")
            return Offered(found.listing, s3_transport.transport(store, found.summed))


def key_prefix(settings: Model, request: ModelRequest) -> str:
    """What the keys of this model begin with: 'PREFIX/NAME/', or the whole prefix that the settings give."""
    given = settings.r2_object_prefix.strip("/")
    parts = [given] if given else [settings.r2_models_prefix.strip("/"), request.name]
    return "".join(f"{part}/" for part in parts if part)
