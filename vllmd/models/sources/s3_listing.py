"""ListObjectsV2, page by page, until the store says that it has no more or we that it is enough."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from vllmd.errors import ModelInvalid, VllmdError
from vllmd.models.inventory import MAX_FILES
from vllmd.models.remote import Listing, RemoteFile
from vllmd.models.sources import s3_errors
from vllmd.models.sources.s3_store import Store

LISTING_S = 300.0
MAX_PAGES = 2000
_ETAG = re.compile(r"[\x21\x23-\x7e]{1,200}")
_NO_LISTING = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What botocore's parser raises where a field is not what it should be."""


@dataclass(frozen=True, slots=True)
class Listed:
    """`summed`: the keys for which the store says that it has checksums."""

    listing: Listing
    summed: frozenset[str]


def listed(store: Store) -> Listed:
    """All objects below the prefix. ConfigError, PermissionMissing, SourceUnavailable; ModelInvalid where there are too many."""
    place = store.place
    files: list[RemoteFile] = []
    summed: set[str] = set()
    tokens: set[str] = set()
    token, until = "", time.monotonic() + LISTING_S
    while True:
        page = _page(store, token)
        take(page, place, files, summed)
        if not page.get("IsTruncated"):
            return Listed(Listing(tuple(files), place.origin), frozenset(summed))
        token = _next(page, tokens, place)
        if len(files) > MAX_FILES:
            raise _endless(place, f"lists more than {MAX_FILES} objects")
        if len(tokens) > MAX_PAGES or time.monotonic() > until:
            raise s3_errors.unreadable(place, f"it has no end ({len(files)} objects on {len(tokens)} pages)")


def _page(store: Store, token: str) -> dict[str, Any]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    asked = {"Bucket": store.place.bucket, "Prefix": store.place.prefix} | ({"ContinuationToken": token} if token else {})
    try:
        page: dict[str, Any] = store.client.list_objects_v2(**asked)
    except VllmdError:
        raise
    except (BotoCoreError, ClientError, ResponseParserError, *_NO_LISTING) as error:
        raise s3_errors.of_exception(error, store.place) from error
    return page


def take(page: dict[str, Any], place: s3_errors.Place, files: list[RemoteFile], summed: set[str]) -> None:
    """What is on a page, added to `files`; to `summed` the keys of what has checksums."""
    for item in page.get("Contents", ()):
        key, size = item.get("Key"), item.get("Size")
        if not isinstance(key, str) or not isinstance(size, int):
            raise s3_errors.unreadable(place, "an object without a key or a size")
        if not key.startswith(place.prefix):
            raise _endless(place, f"lists {place.clean(key)!r}, which does not begin so")
        name = key[len(place.prefix) :]
        if not name or (key.endswith("/") and not size):
            continue  # what web consoles make for a 'directory'
        files.append(RemoteFile(name, size, _pin(item.get("ETag")), key=key))
        if item.get("ChecksumAlgorithm"):
            summed.add(key)


def _pin(etag: object) -> str:
    """The ETag without its quotes; '' for a weak one, which no If-Match ever matches, and for what no header can carry.

    Never taken for an MD5: with KMS it is none, and a listing does not say so. A sound download must not be condemned for it.
    """
    text = etag.strip() if isinstance(etag, str) else ""
    text = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    return text if _ETAG.fullmatch(text) else ""


def _next(page: dict[str, Any], tokens: set[str], place: s3_errors.Place) -> str:
    token = page.get("NextContinuationToken")
    if not isinstance(token, str) or not token:
        raise s3_errors.unreadable(place, "it is cut, and does not say where it goes on (no ListObjectsV2?)")
    if token in tokens:
        raise s3_errors.unreadable(place, "it goes round in circles")
    tokens.add(token)
    return token


def _endless(place: s3_errors.Place, why: str) -> ModelInvalid:
    hint = "Do model.r2_bucket, model.r2_models_prefix and model.r2_object_prefix name the directory of one model?"
    return ModelInvalid("model_unsafe", f"{place.origin} {why}", hint)
