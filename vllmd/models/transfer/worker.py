"""A thread that fetches parts: asks, judges the answer, moves the body into the file, and asks again from the byte reached
when something breaks."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from vllmd.errors import SourceUnavailable
from vllmd.models.remote import Request, Transport
from vllmd.models.transfer import answers
from vllmd.models.transfer.answers import Again, Asked
from vllmd.models.transfer.client import Answer, Client
from vllmd.models.transfer.receive import Receiver, write_all
from vllmd.models.transfer.work import Ended, Part, Task, Work

NOTE_BYTES = 4 << 20
"""How often it is noted what of a part is there."""
PROGRESS_BYTES = 64 << 10
"""A server that gives less than that before it breaks has given nothing."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How to go about it. `prepare` opens the task's file; `came` is told of each piece [begin, end) in it, `lost` of bytes that come once more; `note` puts
    such a piece into the journal; `landed` after a part is complete. `back_off_s` is the first wait after a failure."""

    attempts: int
    back_off_s: float
    origin: str
    prepare: Callable[[Task], None]
    came: Callable[[Task, int, int], None]
    lost: Callable[[int], None]
    note: Callable[[Task, int, int], None]
    landed: Callable[[Task, memoryview], None]
    log: Callable[[str], None]


class Worker:
    """One thread's. `run` ends when all is fetched; Ended where another thread failed; errors of our tree."""

    def __init__(self, work: Work, transport: Transport, client: Client, manner: Manner) -> None:
        self._work, self._transport, self._client, self._manner = work, transport, client, manner
        self._receiver = Receiver()

    def run(self) -> None:
        try:
            while (part := self._work.claim()) is not None:
                try:
                    self._manner.prepare(part.task)
                    self._fetch(part)
                except BaseException as error:
                    self._work.fail(error)  # first, or another thread takes the part over
                    raise
                finally:
                    self._work.leave(part)
                self._manner.landed(part.task, self._receiver.buffer)
        finally:
            self._receiver.close()
            self._client.close()

    def _fetch(self, part: Part) -> None:
        failures = 0
        while part.position < part.end:
            begin = part.position
            try:
                if not self._attempt(part):
                    return
            except (OSError, Again, ssl.SSLError) as error:
                if self._work.ended.is_set():
                    raise Ended from error
                failures = failures + 1 if part.position - begin < PROGRESS_BYTES else 1
                self._wait(part, failures, error)

    def _wait(self, part: Part, failures: int, error: Exception) -> None:
        reason = error.reason if isinstance(error, Again) else str(error) or type(error).__name__
        if failures >= self._manner.attempts:
            what = f"{part.task.name} of {self._manner.origin} could not be fetched: {reason} ({failures} attempts)"
            raise SourceUnavailable("source_unavailable", what, "Look at the network and at the server; what is here already is kept.")
        wait_s = answers.back_off(failures, self._manner.back_off_s)
        wait_s = max(wait_s, error.after_s if isinstance(error, Again) else 0.0)
        self._manner.log(f"{part.task.name}: {reason}; asking again from byte {part.position} in {wait_s:.1f} s")
        if self._work.ended.wait(wait_s):
            raise Ended

    def _attempt(self, part: Part) -> bool:
        """One request and what comes of it. False where another thread fetches the part."""
        task = part.task
        asked, answer = self._answer(part)
        try:
            body_begin = answers.begins_at(asked, answer.head.status, answer.head.headers)
            if body_begin != part.position or (answer.head.status == 200 and part.end != task.file.size):
                lost = self._work.whole(part)
                if lost is None:
                    self._client.drop(answer)
                    return False
                self._manner.lost(lost)
                self._manner.log(f"{task.name}: {asked.host} ignores ranges, so it comes in one piece")
            self._body(part, answer, body_begin)
        except BaseException as error:
            self._client.drop(answer)
            if answer.connection.aborted and isinstance(error, OSError | Again):
                raise Again(answer.connection.aborted) from error
            raise
        self._client.keep(answer)
        return True

    def _answer(self, part: Part) -> tuple[Asked, Answer]:
        """A 200 or 206. Where a redirect led is asked again directly, until it refuses: a signed URL lives an hour or so."""
        task = part.task
        if task.location:
            request = Request(task.location, {"Range": f"bytes={part.position}-{part.end - 1}"})
            answer = self._get(request)
            if answer.head.status < 400 or answer.head.status in answers.RETRIED:
                return self._accepted(part, answer, moved=True)
            task.location = ""
            self._client.drop(answer)
        request = self._transport.request(task.file, part.position, part.end)
        headers = dict(request.headers)
        if not any(name.lower() == "range" for name in headers) and (part.position, part.end) != (0, task.file.size):
            headers["Range"] = f"bytes={part.position}-{part.end - 1}"
        answer = self._get(Request(request.url, headers))
        accepted = self._accepted(part, answer, moved=answer.moved)
        if answer.url != request.url and answer.moved and "range" not in urlsplit(answer.url).query.lower():
            task.location = answer.url
        return accepted

    def _get(self, request: Request) -> Answer:
        return self._client.get(request)

    def _accepted(self, part: Part, answer: Answer, *, moved: bool) -> tuple[Asked, Answer]:
        asked = Asked(part.task.file, part.position, part.end, answer.host, moved)
        status = answer.head.status
        if status in (200, 206):
            return asked, answer
        try:
            body = answer.connection.short_body(answer.head)
        except (OSError, Again):
            body = b""
        self._client.keep(answer)
        if status in answers.RETRIED:
            raise Again(f"{asked.host} answered {status}", answers.retry_after(answer.head.headers.get("retry-after", "")))
        if moved and status == 403:  # a CDN's limit, or a signature of a moment ago; who may have the file was said where it is listed
            raise Again(f"{asked.host}, where the source leads, answered {status}")
        self._manner.log(f"{part.task.name}: {asked.host} answered {status}")
        raise self._transport.refused(part.task.file, status, body) or answers.final(asked, status, self._manner.origin)

    def _body(self, part: Part, answer: Answer, begin: int) -> None:
        source = answer.connection
        length = answer.head.length
        if length is not None and length != part.end - begin:
            raise Again(f"{answer.host} sent {length} bytes instead of {part.end - begin}")
        noted = part.position

        def moved(position: int) -> None:
            nonlocal noted
            self._manner.came(part.task, part.position, position)
            part.position = position
            if position - noted >= NOTE_BYTES:
                self._manner.note(part.task, noted, position)
                noted = position
            if self._work.ended.is_set():
                raise Ended

        try:
            if length is None:
                self._chunked(part, answer, begin, moved)
            else:
                self._receiver.skip(source, part.position - begin)
                self._receiver.copy(source, part.task.fd, part.position, part.end, part.task.name, moved)
        finally:
            if part.position > noted:
                self._manner.note(part.task, noted, part.position)

    def _chunked(self, part: Part, answer: Answer, begin: int, moved: Callable[[int], None]) -> None:
        position = begin
        for chunk in answer.connection.chunks():
            if position + len(chunk) > part.end:
                asked = Asked(part.task.file, begin, part.end, answer.host, answer.moved)
                raise answers.changed(asked, f"is longer than the {part.task.file.size} bytes that were listed")
            new = chunk[max(part.position - position, 0) :]  # what is there already comes once more
            position += len(chunk)
            if new:
                write_all(part.task.fd, new, part.position, part.task.name)
                moved(position)
        if position < part.end:
            raise ConnectionResetError(f"the body ended {part.end - position} bytes early")
