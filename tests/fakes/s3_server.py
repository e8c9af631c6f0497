"""An S3 that says whatever the test wants, over real sockets; for the right answers there is moto's server."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Asked:
    method: str
    target: str
    headers: dict[str, str]

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def token(self) -> str:
        return parse_qs(urlsplit(self.target).query).get("continuation-token", [""])[0]

    @property
    def authorization(self) -> str:
        return self.headers.get("authorization", "")

    @property
    def access_key(self) -> str:
        return self.authorization.partition("Credential=")[2].partition("/")[0]

    @property
    def region(self) -> str:
        return self.authorization.partition("Credential=")[2].split("/")[2] if self.authorization else ""


@dataclass(frozen=True)
class Reply:
    """`body` in parts, each sent at once; without `length` the end of the connection ends it."""

    status: int = 200
    body: bytes | Iterable[bytes] = b""
    headers: dict[str, str] = field(default_factory=dict)


Script = Callable[[Asked], Reply]


class S3Server:
    """`asked` is what came, in order. `closing` is set when the test is over: replies that stall wait for it."""

    def __init__(self, script: Script, certificate: Path | None = None) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.closing = threading.Event()
        self._http = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
            self.url = self.url.replace("http:", "https:")
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def __enter__(self) -> S3Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def stalled(self, *parts: bytes) -> Iterator[bytes]:
        """These parts, then nothing until the test is over."""
        yield from parts
        self.closing.wait(60)


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are what these tests are about."""


def _handler(server: S3Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = Asked(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            server.asked.append(asked)
            reply = server.script(asked)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if isinstance(reply.body, bytes):
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self._send(reply.body)

        do_HEAD = do_PUT = do_GET

        def _send(self, body: bytes | Iterable[bytes]) -> None:
            with contextlib.suppress(OSError):
                for part in (body,) if isinstance(body, bytes) else body:
                    self.wfile.write(part)
                    self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def item(key: str, size: int = 3, etag: str = '"abc"', more: str = "") -> str:
    modified = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    return f"<Contents><Key>{key}</Key>{modified}<ETag>{etag}</ETag><Size>{size}</Size>{more}<StorageClass>STANDARD</StorageClass></Contents>"


def listing(*items: str, token: str = "", truncated: bool | None = None) -> Reply:
    """One page of ListObjectsV2; with a token there are more."""
    is_cut = bool(token) if truncated is None else truncated
    following = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>models</Name>'
        f"<KeyCount>{len(items)}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>{str(is_cut).lower()}</IsTruncated>"
        f"<EncodingType>url</EncodingType>{following}{''.join(items)}</ListBucketResult>"
    )
    return Reply(200, text.encode(), {"Content-Type": "application/xml"})


def error(status: int, code: str, message: str = "said the store", more: str = "", **headers: str) -> Reply:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{more}<RequestId>1</RequestId></Error>'
    return Reply(status, text.encode(), {"Content-Type": "application/xml", **{name.replace("_", "-"): value for name, value in headers.items()}})
