"""A hub over real sockets, as far as its clients' reading goes: API, files, and a CDN on another port that LFS files are redirected to.

    with FakeHub({"acme/Tiny": demo.make(tmp_path / "m")}) as hub:
        Model(hf_endpoint=hub.url)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass(frozen=True)
class Asked:
    """`server` is hub or cdn."""

    server: str
    method: str
    target: str
    headers: dict[str, str]

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def authorization(self) -> str:
        return self.headers.get("authorization", "")


@dataclass(frozen=True)
class Reply:
    """`body` in parts is sent as they come, and the end of the connection ends it."""

    status: int = 200
    body: bytes | Iterable[bytes] = b""
    headers: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """`gated` and `private` repositories want `token`; any other token is a bad one. `script` may answer in the hub's place (None:
    the hub answers). With a `certificate` (PEM, with its key) it speaks TLS. `asked` is all that came, in order; `sent_bytes` of bodies, by server."""

    def __init__(
        self,
        models: Mapping[str, Path | Mapping[str, bytes]],
        *,
        token: str = "hf_good",
        gated: Iterable[str] = (),
        private: Iterable[str] = (),
        script: Callable[[Asked], Reply | None] = lambda _asked: None,
        certificate: Path | None = None,
    ) -> None:
        self.models = {name: _files(content) for name, content in models.items()}
        self.token, self.gated, self.private, self.script = token, set(gated), set(private), script
        self.refs: dict[str, dict[str, str]] = {name: {"main": _commit(files)} for name, files in self.models.items()}
        self.xet_url = ""
        """Where files are in Xet too, if they are."""
        self.asked: list[Asked] = []
        self.sent_bytes = {"hub": 0, "cdn": 0}
        self.closing = threading.Event()
        self._history = {(name, self.commit(name)): files for name, files in self.models.items()}
        self._hub, self._cdn = _Server(_handler(self, "hub"), certificate), _Server(_handler(self, "cdn"), certificate)
        self.url, self.cdn_url = self._hub.url, self._cdn.url

    def __enter__(self) -> FakeHub:
        self._hub.start()
        self._cdn.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._hub.stop()
        self._cdn.stop()

    def commit(self, name: str) -> str:
        return self.refs[name]["main"]

    def push(self, name: str, content: Path | Mapping[str, bytes]) -> str:
        """A new commit of main; the old one stays."""
        files = _files(content)
        self.models[name] = files
        self.refs[name]["main"] = _commit(files)
        self._history[name, self.commit(name)] = files
        return self.commit(name)

    def stalled(self, *parts: bytes) -> Iterator[bytes]:
        """These parts, then nothing until the test is over."""
        yield from parts
        self.closing.wait(60)

    def tokens_seen(self, server: str) -> set[str]:
        return {asked.authorization for asked in self.asked if asked.server == server and asked.authorization}

    def answer(self, asked: Asked) -> Reply:
        scripted = self.script(asked)
        if scripted is not None:
            return scripted
        if asked.server == "cdn":
            return self._cdn_file(asked)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+?))?", asked.path):
            return self._info(asked, match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", asked.path):
            return self._tree(asked, match[1], match[2])
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/xet-read-token/[^/]+", asked.path):
            key = {"X-Xet-Cas-Url": self.xet_url, "X-Xet-Access-Token": "xet_key", "X-Xet-Token-Expiration": "4000000000"}
            return Reply(200, b"{}", key)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", asked.path):
            return self._resolve(asked, match[1], match[2], match[3])
        return refusal(404, "", "Not found")

    def _refused(self, asked: Asked, name: str, *, files: bool) -> Reply | None:
        given = asked.authorization.removeprefix("Bearer ")
        if given and given != self.token:
            return refusal(401, "", "Invalid credentials in Authorization header")
        if name not in self.models or (name in self.private and not given):
            return refusal(404 if given else 401, "RepoNotFound", "Repository not found" if given else "Invalid username or password.")
        if files and name in self.gated and not given:
            return refusal(401, "GatedRepo", f"Access to model {name} is restricted. You must have access to it and be authenticated to access it. Please log in.")
        return None

    def _at(self, name: str, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        commit = self.refs[name].get(revision, revision)
        files = self._history.get((name, commit))
        return None if files is None else (commit, files)

    def _found(self, asked: Asked, name: str, revision: str, *, files: bool) -> tuple[str, Mapping[str, bytes]] | Reply:
        """The commit and its files, or why they are not given."""
        return self._refused(asked, name, files=files) or self._at(name, revision) or refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _info(self, asked: Asked, name: str, revision: str) -> Reply:
        found = self._found(asked, name, revision, files=False)
        if isinstance(found, Reply):
            return found
        commit, files = found
        blobs = "blobs" in parse_qs(urlsplit(asked.target).query)
        siblings = [_sibling(path, content) if blobs else {"rfilename": path} for path, content in files.items()]
        return page({"id": name, "sha": commit, "private": name in self.private, "gated": "manual" if name in self.gated else False, "siblings": siblings})

    def _tree(self, asked: Asked, name: str, revision: str) -> Reply:
        found = self._found(asked, name, revision, files=False)
        if isinstance(found, Reply):
            return found
        return page([_entry(path, content) for path, content in found[1].items()])

    def _resolve(self, asked: Asked, name: str, revision: str, path: str) -> Reply:
        found = self._found(asked, name, revision, files=True)
        if isinstance(found, Reply):
            return found
        commit, files = found
        if path not in files:
            return refusal(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path.endswith(LFS):
            return _ranged(asked, content, headers | {"ETag": f'"{_git_sha1(content)}"'})
        sha256 = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)), "ETag": f'"{_git_sha1(_pointer(content))}"'}
        if self.xet_url:
            headers |= {"X-Xet-Hash": sha256, "Link": f'<{self.url}/api/models/{name}/xet-read-token/{commit}>; rel="xet-auth"'}
        location = f"{self.cdn_url}/{name}/{sha256}?X-Amz-Signature={'0' * 64}&response-content-disposition={quote(path)}"
        return Reply(302, b"Found", headers | {"Location": location})

    def _cdn_file(self, asked: Asked) -> Reply:
        sha256 = asked.path.rpartition("/")[2]
        if asked.authorization or "X-Amz-Signature=" not in asked.target:
            return Reply(400, b"<Error><Code>InvalidArgument</Code></Error>")  # as S3 does for two kinds of authentication
        for files in self._history.values():
            for content in files.values():
                if hashlib.sha256(content).hexdigest() == sha256:
                    return _ranged(asked, content, {"ETag": '"cdn-has-others"'})
        return Reply(403, b"<Error><Code>AccessDenied</Code></Error>")


def page(value: Any) -> Reply:
    return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refusal(status: int, code: str, message: str, **headers: str) -> Reply:
    """An error as the hub sends it: its code and text in headers, the text in the body of /resolve/ too."""
    said = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Reply(status, message.encode(), said | {name.replace("_", "-"): value for name, value in headers.items()})


def _files(content: Path | Mapping[str, bytes]) -> dict[str, bytes]:
    if isinstance(content, Path):
        return {str(path.relative_to(content)): path.read_bytes() for path in sorted(content.rglob("*")) if path.is_file()}
    return dict(content)


def _commit(files: Mapping[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted((name, hashlib.sha1(content).hexdigest()) for name, content in files.items())).encode()).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(content: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (hashlib.sha256(content).hexdigest().encode(), len(content))


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    if not path.endswith(LFS):
        return {"rfilename": path, "size": len(content), "blobId": _git_sha1(content)}
    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": len(_pointer(content))}
    return {"rfilename": path, "size": len(content), "blobId": _git_sha1(_pointer(content)), "lfs": lfs}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    sibling = _sibling(path, content)
    entry = {"type": "file", "path": path, "size": len(content), "oid": sibling["blobId"]}
    if "lfs" in sibling:
        entry["lfs"] = {"oid": sibling["lfs"]["sha256"], "size": len(content), "pointerSize": sibling["lfs"]["pointerSize"]}
    return entry


def _ranged(asked: Asked, content: bytes, headers: dict[str, str]) -> Reply:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.headers.get("range", ""))
    if not match:
        return Reply(200, content, headers)
    begin, end = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
    if begin >= len(content):
        return Reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    return Reply(206, content[begin:end], headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"})


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them

    def __init__(self, handler: type[BaseHTTPRequestHandler], certificate: Path | None) -> None:
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.url = self.url.replace("http:", "https:")
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # kept ones wait for a request that never comes
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are what these tests are about."""


def _handler(hub: FakeHub, server: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = Asked(server, self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            hub.asked.append(asked)
            reply = hub.answer(asked)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if isinstance(reply.body, bytes):
                self.send_header("Content-Length", str(len(reply.body)))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self._send(reply.body)

        do_HEAD = do_GET

        def _send(self, body: bytes | Iterable[bytes]) -> None:
            with contextlib.suppress(OSError):
                for part in (body,) if isinstance(body, bytes) else body:
                    self.wfile.write(part)
                    self.wfile.flush()
                    hub.sent_bytes[server] += len(part)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
