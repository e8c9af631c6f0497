"""An ASGI middleware that lets in who brings a key, on every path: `--middleware vllmd_guard.Guard`.

It runs inside the engine, under the engine's own Python, so it is one file that needs nothing but the standard library (3.9
and newer). The engine's own key guards a few prefixes only: vLLM leaves /invocations, /tokenize and more open.

The environment names a file (VLLMD_GUARD_FILE) that holds the keys as SHA-256 sums, and the paths that need none. It is
looked at before each request, and read again when it is another one: a key that is revoked is refused at once. Where it cannot
be read, or is not what it should be, nobody has a key (503). What was refused is counted in a file for each process, beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import stat
import sys
import time
from typing import Any, Awaitable, Callable, Dict, Mapping, MutableMapping, Optional, Tuple  # noqa: UP035 - of Python 3.9

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FILE_VARIABLE = "VLLMD_GUARD_FILE"
COUNTS = "refusals"
"""Directory beside that file; without it nothing is counted."""
SCHEMA = 1
FILE_MAX_BYTES = 1 << 20
KEY_MAX_BYTES = 512
REASONS = ("missing", "malformed", "wrong", "unavailable")

_TEXT = {
    "missing": "this server wants an API key: send the header 'Authorization: Bearer KEY'",
    "malformed": "the API key cannot be read: send one header 'Authorization: Bearer KEY', and no other with a key",
    "wrong": "the API key is not valid",
    "unavailable": "the server cannot read its API keys",
}


class Guard:
    """The outermost middleware of the engine's app."""

    def __init__(self, app: App, file: Optional[str] = None) -> None:  # noqa: UP045
        self.app = app
        self.rules = Rules(os.environ.get(FILE_VARIABLE, "") if file is None else file)
        self.counts = Counts(os.path.join(os.path.dirname(self.rules.path), COUNTS))  # noqa: PTH118, PTH120

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        reason = self.rules.refusal(scope)
        if not reason:
            return await self.app(scope, receive, send)
        self.counts.add(reason)
        if scope["type"] == "http":
            return await _refuse(send, "http.response", reason)
        if scope["type"] == "websocket":
            return await _refuse_socket(scope, receive, send, reason)
        raise RuntimeError(f"vllmd_guard: a connection of a kind that is not known here: {scope['type']!r}")


class Rules:
    """What the file says, as it is now."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._seen: Any = None
        self._said = ""
        self._open: frozenset[str] = frozenset()
        self._keys: Optional[Tuple[Tuple[bytes, Optional[float]], ...]] = None  # noqa: UP006, UP045

    def refusal(self, scope: Scope) -> str:
        """'' for who may pass, else one of REASONS."""
        self._look()
        if scope["type"] == "http" and (route_path(scope) in self._open or is_preflight(scope)):
            return ""
        try:
            key = key_of(scope)
        except ValueError:
            return "unavailable" if self._keys is None else "malformed"
        if self._keys is None:
            return "unavailable"
        if not key:
            return "missing"
        return "" if self._knows(key) else "wrong"

    def _knows(self, key: bytes) -> bool:
        """Against all of them, also when one has matched: the time says nothing."""
        given, now, known = hashlib.sha256(key).digest(), time.time(), False
        for digest, until in self._keys or ():
            known |= hmac.compare_digest(given, digest) and (until is None or now < until)
        return known

    def _look(self) -> None:
        """The paths that were open stay so where the file cannot be read; nobody has a key then."""
        try:
            about = os.stat(self.path, follow_symlinks=False)  # noqa: PTH116
            seen = (about.st_dev, about.st_ino, about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_mode, about.st_uid)
            if seen == self._seen:
                return
            self._open, self._keys = _parse(_read(self.path))
            self._seen, self._said = seen, ""
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._keys = self._seen = None
            self._say(f"{type(error).__name__}: {error}")

    def _say(self, what: str) -> None:
        """Once for each cause, not for each request."""
        if what != self._said:
            self._said = what
            sys.stderr.write(f"ERROR vllmd_guard: every request is refused, the keys cannot be read from {self.path or FILE_VARIABLE}: {what}\n")
            sys.stderr.flush()


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("not a regular file")
        if about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o022:
            raise ValueError("somebody else could have written it")
        content = b""
        while len(content) <= FILE_MAX_BYTES:
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                return content
            content += piece
        raise ValueError("too large")
    finally:
        os.close(descriptor)


def _parse(content: bytes) -> Tuple[frozenset[str], Tuple[Tuple[bytes, Optional[float]], ...]]:  # noqa: UP006, UP045
    document = json.loads(content.decode("utf-8"))
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']!r} is not known")
    keys = []
    for each in document["keys"]:
        digest, until = bytes.fromhex(each["sha256"]), each.get("until")
        if len(digest) != 32:
            raise ValueError("a sum of the wrong length")
        keys.append((digest, None if until is None else float(until)))
    paths = document["open_paths"]
    if not isinstance(paths, list) or not all(isinstance(path, str) and path.startswith("/") for path in paths):
        raise ValueError("open_paths is no list of paths")
    return frozenset(paths), tuple(keys)


def route_path(scope: Scope) -> str:
    """The path that the app will look up, as Starlette takes it from below --root-path."""
    path, root = scope.get("path", ""), scope.get("root_path", "")
    if root and (path == root or path.startswith(root + "/")):
        return str(path[len(root) :])
    return str(path)


def is_preflight(scope: Scope) -> bool:
    """What a browser asks before a request with a key, and can send no key with. The engine's CORS middleware answers it
    (these two headers are how it knows it), and no route ever sees it."""
    if scope.get("method") != "OPTIONS":
        return False
    names = {bytes(name).lower() for name, _ in scope.get("headers", ())}
    return b"origin" in names and b"access-control-request-method" in names


def key_of(scope: Scope) -> bytes:
    """b'' where there is none. ValueError for a header that can be read in two ways, or in none: with two of them a proxy may
    have checked the other one. `x-api-key` is what clients of /v1/messages send."""
    found = [(bytes(name).lower(), bytes(value)) for name, value in scope.get("headers", ()) if bytes(name).lower() in (b"authorization", b"x-api-key")]
    if not found:
        return b""
    if len(found) > 1:
        raise ValueError("more than one")
    name, value = found[0]
    key = value.strip(b" \t")
    if name == b"authorization":
        scheme, _, key = key.partition(b" ")
        if scheme.lower() != b"bearer":
            raise ValueError("not Bearer")
        key = key.strip(b" \t")
    if not key or len(key) > KEY_MAX_BYTES or any(not 0x20 < byte < 0x7F for byte in key):
        raise ValueError("no key")
    return key


class Counts:
    """One short file for each process: `missing malformed wrong unavailable` as numbers. The supervisor adds them up."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._pid = 0
        self._file = -1
        self._counts: Dict[str, int] = {}  # noqa: UP006

    def add(self, reason: str) -> None:
        if self._pid != os.getpid():  # also after a fork
            self._begin()
        self._counts[reason] += 1
        if self._file >= 0:
            with contextlib.suppress(OSError):  # a count that is lost opens nothing
                os.pwrite(self._file, line(self._counts), 0)

    def _begin(self) -> None:
        self._pid, self._counts = os.getpid(), dict.fromkeys(REASONS, 0)
        try:
            if self._file >= 0:
                os.close(self._file)
            path = os.path.join(self._directory, str(self._pid))  # noqa: PTH118
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            self._file = -1


def line(counts: Mapping[str, int]) -> bytes:
    """It only ever grows: a later one hides an earlier one."""
    return (" ".join(str(counts[reason]) for reason in REASONS) + "\n").encode()


def _answer(reason: str) -> Tuple[int, list[Tuple[bytes, bytes]], bytes]:  # noqa: UP006
    status, kind = (503, "service_unavailable") if reason == "unavailable" else (401, "authentication_error")
    error = {"message": _TEXT[reason], "type": kind, "param": None, "code": "invalid_api_key" if status == 401 else "keys_unavailable"}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return status, headers, body


async def _refuse(send: Send, kind: str, reason: str) -> None:
    status, headers, body = _answer(reason)
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


async def _refuse_socket(scope: Scope, receive: Receive, send: Send, reason: str) -> None:
    """By an answer where the server can, else by a close, which becomes a 403."""
    await receive()  # websocket.connect: nothing may be sent before
    if "websocket.http.response" in (scope.get("extensions") or {}):
        return await _refuse(send, "websocket.http.response", reason)
    return await send({"type": "websocket.close", "code": 1008, "reason": _TEXT[reason]})
