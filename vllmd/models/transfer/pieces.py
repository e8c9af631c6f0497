"""A few small pieces of files that a source offers, into memory: what models/headers reads of a model that is not here.

Never more than was asked: of a server that ignores ranges the rest is not read, its connection is dropped.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from vllmd.errors import SourceUnavailable
from vllmd.models.remote import RemoteFile, Transport
from vllmd.models.transfer import answers, tls
from vllmd.models.transfer.answers import Again, Asked
from vllmd.models.transfer.client import Answer, Client
from vllmd.models.transfer.watch import Watch

ATTEMPTS = 3
BACK_OFF_S = 0.5
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [begin, end) of a file."""

    file: RemoteFile
    begin: int
    end: int


class Pieces:
    """Of one listing. `read_bytes` is what came of bodies so far. Use as a context: connections are kept within."""

    def __init__(self, transport: Transport, origin: str, environ: Mapping[str, str], *, stall_s: float = 30.0, threads: int = 8) -> None:
        self._transport, self._origin, self._environ = transport, origin, environ
        self._watch = Watch(stall_s)
        self._secure: ssl.SSLContext = tls.context(environ)
        self._mine = threading.local()
        self._clients: list[Client] = []
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pieces")
        self._ended = threading.Event()
        self.read_bytes = 0

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watch.end()
        self._pool.shutdown(cancel_futures=True)
        for client in self._clients:
            client.close()

    def get(self, wanted: Sequence[Piece]) -> list[bytes]:
        """In the order that was asked. SourceUnavailable, PermissionMissing, ModelNotFound as a download has them."""
        futures = [self._pool.submit(self._one, piece) for piece in wanted]
        left: set[Future[bytes]] = set(futures)
        while left:
            done, left = wait(left, _LOOK_S, FIRST_EXCEPTION)
            self._watch.look()
            for future in done:
                self.read_bytes += len(future.result())
        return [future.result() for future in futures]

    def _one(self, piece: Piece) -> bytes:
        if piece.end <= piece.begin:
            return b""
        failures = 0
        while True:
            try:
                return self._attempt(piece)
            except (OSError, Again, ssl.SSLError) as error:
                failures += 1
                reason = error.reason if isinstance(error, Again) else str(error) or type(error).__name__
                if failures >= ATTEMPTS or self._ended.is_set():
                    what = f"{piece.file.name} of {self._origin} could not be read: {reason} ({failures} attempts)"
                    raise SourceUnavailable("source_unavailable", what, "Look at the network and at the server.") from error
                after_s = error.after_s if isinstance(error, Again) else 0.0
                self._ended.wait(min(max(answers.back_off(failures, BACK_OFF_S), after_s), 10.0))

    def _attempt(self, piece: Piece) -> bytes:
        answer = self._client().get(self._transport.request(piece.file, piece.begin, piece.end))
        data: bytes | None = None
        try:
            data = self._body(piece, answer)
        finally:
            if data is None or answer.head.status == 200:
                self._client().drop(answer)
            else:
                self._client().keep(answer)
        return data

    def _body(self, piece: Piece, answer: Answer) -> bytes:
        asked = Asked(piece.file, piece.begin, piece.end, answer.host, answer.moved)
        status = answer.head.status
        if status not in (200, 206):
            self._refused(asked, answer)
        skipped = piece.begin - answers.begins_at(asked, status, answer.head.headers)
        count = piece.end - piece.begin
        data = answer.connection.short_body(answer.head, skipped + count)[skipped : skipped + count]
        if len(data) < count:
            raise Again(f"{answer.host} sent {len(data)} bytes instead of {count}")
        return data

    def _refused(self, asked: Asked, answer: Answer) -> None:
        status = answer.head.status
        if status in answers.RETRIED:
            raise Again(f"{asked.host} answered {status}", answers.retry_after(answer.head.headers.get("retry-after", "")))
        body = answer.connection.short_body(answer.head)
        raise self._transport.refused(asked.file, status, body) or answers.final(asked, status, self._origin)

    def _client(self) -> Client:
        client: Client | None = getattr(self._mine, "client", None)
        if client is None:
            client = self._mine.client = Client(self._watch, self._secure, self._environ)
            self._clients.append(client)
        return client
