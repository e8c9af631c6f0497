"""One answer of the store to botocore: bounded in size and time, and looked at before an XML parser sees it.

botocore reads whatever comes to its end: a body without one would fill the memory, one byte in each 29 s would take for ever.
So a hook on its `before-send` event does the sending, through botocore's own HTTP session (proxies, certificates, timeouts).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vllmd.models.sources import s3_errors

CONNECT_S = 10
READ_S = 30
ANSWER_S = 90.0
"""For the whole of one answer."""
MAX_ANSWER_BYTES = 16 << 20
"""A page of 1000 keys of 1024 bytes, each byte as %XX, has 4 MB."""
_CHUNK = 1 << 16
LISTING = re.compile(rb"\s*(<\?xml[^>]{0,200}\?>\s*)?<ListBucketResult[\s>]")
_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]*/\d{8}/([^/,]+)/([^/,]+)/aws4_request,")


@dataclass(frozen=True, slots=True)
class Sent:
    """How the store was asked when it answered: what is needed to ask for the objects in the same way. `region` and
    `service` are those of the signature, '' where there was none."""

    bucket_url: str
    region: str
    service: str


class Sender:
    """botocore's sender of requests. `place` is for the messages."""

    def __init__(self, url: str, verify: Any, place: s3_errors.Place) -> None:
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        self._http = URLLib3Session(verify=verify, proxies=get_environ_proxies(url), timeout=(CONNECT_S, READ_S))
        self._place = place
        self.sent: Sent | None = None
        """The last request that a listing came to."""

    def __call__(self, request: Any, **_: Any) -> Any:
        from botocore.awsrequest import AWSResponse

        request.stream_output = True
        response = self._http.send(request)
        body = self._body(request.url, response.raw)
        if 300 <= response.status_code < 400:
            self._follow(response, body)
        if "list-type=2" in request.url and response.status_code == 200:
            self._check(body)
            self.sent = _sent(request)
        return AWSResponse(response.url, response.status_code, response.headers, _Body(body))

    def close(self) -> None:
        """Drops the connections; the next request makes new ones."""
        self._http.close()

    def _body(self, url: str, raw: Any) -> bytes:
        from botocore.exceptions import ConnectionClosedError, ReadTimeoutError
        from urllib3 import exceptions

        until = time.monotonic() + ANSWER_S
        read = getattr(raw, "read1", raw.read)  # urllib3 1.26 has no read1
        parts: list[bytes] = []
        size = 0
        try:
            while part := read(_CHUNK):
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise s3_errors.unreadable(self._place, f"it is longer than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > until:
                    raise s3_errors.unreadable(self._place, f"it is not complete after {ANSWER_S:.0f} s")
        except exceptions.ReadTimeoutError as error:
            raise ReadTimeoutError(endpoint_url=url, error=error) from error
        except exceptions.HTTPError as error:
            raise ConnectionClosedError(endpoint_url=url, error=error) from error
        finally:
            raw.close()
        return b"".join(parts)

    def _follow(self, response: Any, body: bytes) -> None:
        """botocore follows to the region that the answer names; without one it asks HeadBucket for it, and when that redirects
        too, HeadBucket again, until the stack is full."""
        answer = s3_errors.answer_of(response.status_code, body, self._place.origin)
        if not answer.region and "x-amz-bucket-region" not in response.headers:
            said = answer.message or f"a redirect to {response.headers.get('Location', 'nowhere')}"
            raise s3_errors.of_answer(replace(answer, message=said), self._place)

    def _check(self, body: bytes) -> None:
        """A sign-in page or a proxy's error comes with 200 too, and one of well-formed HTML would pass for an empty bucket."""
        if not LISTING.match(body) or b"<!DOCTYPE" in body:
            raise s3_errors.unreadable(self._place, f"it begins with {self._place.clean(body[:60].decode('utf-8', 'replace'))!r}")


class _Body:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self._content


def _sent(request: Any) -> Sent:
    authorization = request.headers.get("Authorization", "")
    text = authorization.decode("latin-1") if isinstance(authorization, bytes) else str(authorization)
    scope = _SCOPE.match(text)
    region, service = (scope[1], scope[2]) if scope else ("", "s3" if not text else text[:20])
    return Sent(request.url.partition("?")[0].rstrip("/"), region, service)
