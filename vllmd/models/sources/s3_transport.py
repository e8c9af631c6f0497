"""Signed requests for pieces of the objects that were listed, and the sums that the store has of them.

Each request is signed when it is made, by botocore's signer and with credentials that botocore renews: a download may take
longer than either lives. Only the host and x-amz-* are signed: proxies change the rest.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from vllmd.errors import ConfigError, VllmdError
from vllmd.models.remote import RemoteFile, Request
from vllmd.models.sources import s3_errors
from vllmd.models.sources.s3_http import Sent
from vllmd.models.sources.s3_store import Store, translated

_SUMS = {"SHA256": ("sha256", 32), "CRC64NVME": ("crc64nvme", 8), "CRC32C": ("crc32c", 4), "CRC32": ("crc32", 4), "SHA1": ("sha1", 20)}


@dataclass(frozen=True, slots=True)
class S3Transport:
    store: Store
    sent: Sent
    summed: frozenset[str]

    def request(self, file: RemoteFile, begin: int, end: int) -> Request:
        """Also PermissionMissing where credentials have run out and cannot be renewed."""
        from botocore.awsrequest import AWSRequest

        asked = AWSRequest(method="GET", url=f"{self.sent.bucket_url}/{quote(file.key, safe='/~')}")
        if self.store.credentials is not None:
            with translated(self.store.place):
                self._sign(asked)
        headers = {str(name): str(value) for name, value in asked.headers.items()}
        return Request(asked.url, headers | request_headers(file, begin, end))

    def _sign(self, asked: Any) -> None:
        from botocore.auth import S3SigV4Auth

        frozen = self.store.credentials.get_frozen_credentials()
        S3SigV4Auth(frozen, self.sent.service, self.sent.region).add_auth(asked)

    def refused(self, file: RemoteFile, status: int, body: bytes) -> VllmdError | None:
        return said_by_store(self.store.place, file, status, body)

    def sums(self, file: RemoteFile) -> Mapping[str, str]:
        """The store's checksums of the whole object, by one HeadObject; nothing where the listing named none, and where they
        cannot be had: the size and the pin are verified all the same."""
        from botocore.exceptions import BotoCoreError, ClientError

        if file.key not in self.summed:
            return {}
        match = {"IfMatch": f'"{file.pin}"'} if file.pin else {}
        try:
            head = self.store.client.head_object(Bucket=self.store.place.bucket, Key=file.key, ChecksumMode="ENABLED", **match)
        except (BotoCoreError, ClientError, VllmdError):
            return {}
        return whole_sums(head)


def request_headers(file: RemoteFile, begin: int, end: int) -> dict[str, str]:
    """What is not signed of a request for a piece."""
    headers = {"Accept-Encoding": "identity"}
    if end > begin:
        headers["Range"] = f"bytes={begin}-{end - 1}"
    return headers | ({"If-Match": f'"{file.pin}"'} if file.pin else {})


def said_by_store(place: s3_errors.Place, file: RemoteFile, status: int, body: bytes) -> VllmdError | None:
    answer = s3_errors.answer_of(status, body, f"s3://{place.bucket}/{place.clean(file.key)}")
    if answer.code == str(status) and status not in (401, 403, 412, 416):
        return None  # not the store's own words
    return s3_errors.of_answer(answer, place)


def transport(store: Store, summed: frozenset[str]) -> S3Transport:
    """ConfigError for a bucket whose requests are signed in another way."""
    sent = store.sender.sent
    if sent is None or sent.service != "s3":
        hint = "Directory buckets and multi-region access points are not supported: give a usual bucket."
        raise ConfigError("s3_signature", f"{store.place.origin} needs another signature than SigV4", hint)
    return S3Transport(store, sent, summed)


def whole_sums(head: Mapping[str, Any]) -> dict[str, str]:
    """Checksums of the whole object out of an answer, as hex. One of its parts' checksums (SUM-PARTS) says nothing of it."""
    found: dict[str, str] = {}
    if head.get("ChecksumType") == "COMPOSITE":
        return found
    for name, (algorithm, size) in _SUMS.items():
        try:
            value = base64.b64decode(str(head.get(f"Checksum{name}", "")), validate=True)
        except ValueError:
            continue
        if len(value) == size:
            found[algorithm] = value.hex()
    return found
