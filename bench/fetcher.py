"""The product's own way from a bucket to verified files, in a process of its own: `python -m bench.fetcher ENDPOINT BUCKET PREFIX
DIRECTORY sizes|sums`. Source, listing, stage and download are the real ones; nothing is published. Says how long the bytes alone took."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from vllmd.config.settings import Model
from vllmd.models.download import Limits, download
from vllmd.models.identity import label, request_from
from vllmd.models.listing import checked, selected
from vllmd.models.sources import Context, Offered
from vllmd.models.sources.s3 import S3
from vllmd.models.stage import Stage


def main(endpoint: str, bucket: str, prefix: str, directory: str, mode: str) -> None:
    settings = Model(id="bench/model", dir=directory, r2_bucket=bucket, r2_endpoint_url=endpoint, r2_object_prefix=prefix, r2_region="us-east-1")
    request = request_from(settings, Path())
    found = S3().find(request, Context(settings, os.environ))
    assert isinstance(found, Offered), found
    listing = selected(checked(found.listing), ())
    stage = Stage.open(Path(directory), label(request), listing)
    limits = Limits(settings.fetch_connections, settings.fetch_stall_s, hashes=mode == "sums")
    began = time.monotonic()
    digests = download(listing, found.transport, stage, limits, os.environ, lambda _progress: None, lambda line: print(line, file=sys.stderr))
    print(f"moved in {time.monotonic() - began}")
    assert mode == "sizes" or all(digest.sha256 and digest.blake3 for digest in digests.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
