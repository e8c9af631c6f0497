"""AWS's signature, version 4, of a GET from S3: what botocore's S3SigV4Auth makes (the tests compare them), without its imports."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_NOTHING = hashlib.sha256(b"").hexdigest()
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Keys:
    access: str
    secret: str = field(repr=False)
    token: str = field(default="", repr=False)


def signed(url: str, keys: Keys, region: str, at: float | None = None) -> dict[str, str]:
    """Headers for a GET of `url`, whose path and query are as they will be sent, the query sorted. `at` is now if not given."""
    parts = urlsplit(url)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at))
    headers = {"host": _host(parts.scheme, parts.hostname or "", parts.port), "x-amz-content-sha256": _NOTHING, "x-amz-date": stamp}
    if keys.token:
        headers["x-amz-security-token"] = keys.token
    names = ";".join(headers)
    lines = "".join(f"{name}:{' '.join(value.split())}\n" for name, value in headers.items())
    asked = "\n".join(["GET", parts.path or "/", parts.query, lines, names, _NOTHING])
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(asked.encode()).hexdigest()])
    key = f"AWS4{keys.secret}".encode()
    for word in scope.split("/"):
        key = hmac.digest(key, word.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    sent = {name.title(): value for name, value in headers.items() if name != "host"}
    return {**sent, "Authorization": f"AWS4-HMAC-SHA256 Credential={keys.access}/{scope}, SignedHeaders={names}, Signature={signature}"}


def _host(scheme: str, host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None or port == _PORTS[scheme] else f"{name}:{port}"
