"""The usual case without botocore's client, whose imports and tables take 0.2 s of every start: keys in the environment, an
endpoint in the settings, and nothing else that botocore would have to weigh.

Only an answer without any fault is taken. Whatever else comes, or is set, is left to botocore, which then asks anew: its words, retries,
redirects and chain of credentials stay what they are. So this may only ever be narrower than botocore, never different.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_plus, urlsplit
from xml.etree import ElementTree

from vllmd.config.settings import Model
from vllmd.errors import VllmdError
from vllmd.models.remote import Listing, RemoteFile, Request
from vllmd.models.sources import s3_errors, s3_http, s3_listing
from vllmd.models.sources.s3_signature import Keys, signed
from vllmd.models.sources.s3_transport import request_headers, said_by_store
from vllmd.models.transfer import tls
from vllmd.models.transfer.answers import Again
from vllmd.models.transfer.client import Answer, Client
from vllmd.models.transfer.watch import Watch
from vllmd.system.files import read_small

ANSWER_S = 10.0
"""For the whole of it; botocore then has more patience."""
_KNOWN = frozenset(
    {
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_EC2_METADATA_DISABLED", "AWS_CA_BUNDLE", "AWS_DEFAULT_OUTPUT", "AWS_PAGER",
    }
)  # fmt: skip
"""Variables of which it is known what they mean here; any other AWS_* or BOTO* is botocore's to weigh."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PLAIN_CONFIG = re.compile(r"\s*|[#;].*|\[default\]|output\s*=.*|s3\s*=\s*|\s+(addressing_style\s*=\s*path|(max_|multipart_)\w+\s*=.*)")
"""Lines of ~/.aws/config that change nothing of what is asked here."""
_DATE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]{5,20}Z")
_SPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


@dataclass(frozen=True, slots=True)
class DirectTransport:
    place: s3_errors.Place
    bucket_url: str
    keys: Keys = field(repr=False)
    region: str

    def request(self, file: RemoteFile, begin: int, end: int) -> Request:
        url = f"{self.bucket_url}/{quote(file.key, safe='/~')}"
        return Request(url, signed(url, self.keys, self.region) | request_headers(file, begin, end))

    def refused(self, file: RemoteFile, status: int, body: bytes) -> VllmdError | None:
        return said_by_store(self.place, file, status, body)


@dataclass(frozen=True, slots=True)
class Direct:
    listing: Listing
    transport: DirectTransport


def asked(settings: Model, prefix: str, environ: Mapping[str, str]) -> Direct | None:
    """What the store lists; None where botocore is to be asked instead."""
    transport = _transport(settings, prefix, environ)
    if transport is None:
        return None
    try:
        body = _body(transport, environ)
        files = _files(ElementTree.fromstring(body), transport.place) if body else None
    except (OSError, Again, VllmdError, ElementTree.ParseError, ValueError):
        return None
    return Direct(Listing(tuple(files), transport.place.origin), transport) if files else None


def _transport(settings: Model, prefix: str, environ: Mapping[str, str]) -> DirectTransport | None:
    keys = Keys(environ.get("AWS_ACCESS_KEY_ID", ""), environ.get("AWS_SECRET_ACCESS_KEY", ""), environ.get("AWS_SESSION_TOKEN", ""))
    endpoint = settings.r2_endpoint_url.rstrip("/")
    if not (keys.access and keys.secret and _is_endpoint(endpoint) and _BUCKET.fullmatch(settings.r2_bucket)) or _is_unusual(settings.r2_bucket, environ):
        return None
    if not all(text.isascii() and text.isprintable() and text == text.strip() for text in (keys.access, keys.secret, keys.token)):
        return None
    secrets = tuple(secret for secret in (keys.secret, keys.token) if secret)
    place = s3_errors.Place(settings.r2_bucket, prefix, endpoint, s3_errors.ENVIRONMENT, secrets)
    region = settings.r2_region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "auto"
    return DirectTransport(place, f"{endpoint}/{settings.r2_bucket}", keys, region) if re.fullmatch(r"[a-z0-9-]{1,40}", region) else None


def _is_endpoint(url: str) -> bool:
    """Of a store that is addressed by path; AWS's own know better what they want to be called."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        usable = parts.scheme in ("http", "https") and bool(host) and parts.port != 0 and parts.path == parts.query == parts.fragment == ""
    except ValueError:
        return False
    return usable and "@" not in parts.netloc and bool(re.fullmatch(r"[a-z0-9.-]+", host)) and "amazonaws" not in host


def _is_unusual(bucket: str, environ: Mapping[str, str]) -> bool:
    if bucket.endswith(("--x-s3", "-s3alias")) or any(name not in _KNOWN and name.startswith(("AWS_", "BOTO")) for name in environ):
        return True
    home = environ.get("HOME", "")
    named = environ.get("AWS_CONFIG_FILE") or (f"{home}/.aws/config" if home else "")
    if not named.startswith("/"):
        return True
    try:
        text = read_small(Path(named), 1 << 16).decode()
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return not all(_PLAIN_CONFIG.fullmatch(line) for line in text.splitlines())


def _body(transport: DirectTransport, environ: Mapping[str, str]) -> bytes:
    """The first page of the listing; empty for any other answer than a good one. Bounded as botocore's are."""
    prefix = quote(transport.place.prefix, safe="-_.~")
    url = f"{transport.bucket_url}?encoding-type=url&list-type=2&prefix={prefix}"
    watch = Watch(ANSWER_S)
    client = Client(watch, tls.context(environ), environ)
    limit = threading.Timer(ANSWER_S, watch.end)
    limit.start()
    try:
        answer = client.get(Request(url, signed(url, transport.keys, transport.region)))
        body = b"" if answer.head.status != 200 or answer.moved or answer.url != url else _read(answer)
        client.drop(answer)
    finally:
        limit.cancel()
        client.close()
        limit.join()
    return body if s3_http.LISTING.match(body) and b"<!DOCTYPE" not in body else b""


def _read(answer: Answer) -> bytes:
    """Empty where it is too long, or another length than it says."""
    body = answer.connection.short_body(answer.head, s3_http.MAX_ANSWER_BYTES)
    return body if len(body) <= s3_http.MAX_ANSWER_BYTES and answer.head.length in (None, len(body)) else b""


def _files(page: Any, place: s3_errors.Place) -> list[RemoteFile]:
    """Nothing where it is cut (botocore goes through the pages), or the store has sums (it is botocore that asks for them)."""
    if page.findtext(f"{_SPACE}IsTruncated") != "false" or page.findtext(f"{_SPACE}EncodingType") not in (None, "url"):
        return []
    is_quoted = page.findtext(f"{_SPACE}EncodingType") == "url"
    items = []
    for found in page.iterfind(f"{_SPACE}Contents"):
        key, size, date = (found.findtext(f"{_SPACE}{tag}", "") for tag in ("Key", "Size", "LastModified"))
        if not (size.isascii() and size.isdigit() and _DATE.fullmatch(date)):
            return []
        items.append({"Key": unquote_plus(key) if is_quoted else key, "Size": int(size), "ETag": found.findtext(f"{_SPACE}ETag")})
        if found.find(f"{_SPACE}ChecksumAlgorithm") is not None:
            return []
    files: list[RemoteFile] = []
    s3_listing.take({"Contents": items}, place, files, set())
    return files
