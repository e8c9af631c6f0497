"""Pure: what a server's answer to a request for bytes [begin, end) of a file means."""

from __future__ import annotations

import email.utils
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from vllmd.errors import ModelNotFound, PermissionMissing, SourceUnavailable, VllmdError
from vllmd.models.remote import RemoteFile

RETRIED = {408, 425, 429, *range(500, 600)}
REDIRECTS = {301, 302, 303, 307, 308}
LONGEST_WAIT_S = 300.0
_PERMISSION = {
    401: "Its credentials are missing or wrong.",
    403: "The credentials may not read it, or have expired; or this host's clock is wrong.",
    407: "The proxy wants credentials: http://USER:PASSWORD@HOST:PORT in the variable that names it.",
}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20}|\*)")
_HASH = re.compile(r"[0-9a-f]{32,64}(-\d{1,5})?")


class Again(Exception):
    """The attempt failed in a way that another may not. `after_s` is the least that the server asks to wait."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class Asked:
    """Bytes [begin, end) of `file`; `host` where it was asked, `moved` whether that is another than the source's own."""

    file: RemoteFile
    begin: int
    end: int
    host: str
    moved: bool


def begins_at(asked: Asked, status: int, headers: Mapping[str, str]) -> int:
    """Where in the file the body of a 200 or 206 begins: at `asked.begin`, or at 0 where the server ignores ranges.

    SourceUnavailable(source_changed) where it is not the file that was listed; Again where the answer makes no sense.
    """
    if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise Again(f"{asked.host} sent {asked.file.name} with the encoding {headers['content-encoding'][:40]!r}")
    if status == 206:
        _check_range(asked, headers.get("content-range", ""))
    else:
        _check_whole(asked, headers)
    _check_tag(asked, headers.get("etag", ""))
    return asked.begin if status == 206 else 0


def _check_range(asked: Asked, text: str) -> None:
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        raise Again(f"{asked.host} sent a part of {asked.file.name} without saying which")
    if match[3] != "*" and int(match[3]) != asked.file.size:
        raise changed(asked, f"has {match[3]} bytes, and {asked.file.size} were listed")
    if (int(match[1]), int(match[2]) + 1) != (asked.begin, asked.end):
        raise Again(f"{asked.host} sent other bytes of {asked.file.name} than asked")


def _check_whole(asked: Asked, headers: Mapping[str, str]) -> None:
    length = headers.get("content-length", "")
    if length in ("", str(asked.file.size)):
        return
    if headers.get("content-type", "").lower().startswith("text/html"):
        what = f"{asked.host} sent a web page for {asked.file.name}: a login page, or a proxy's"
        raise SourceUnavailable("captive_portal", what, f"Open https://{asked.host}/ from this host, or look at its proxy settings.")
    raise changed(asked, f"has {length[:20]} bytes, and {asked.file.size} were listed")


def _check_tag(asked: Asked, tag: str) -> None:
    """A pin that was an ETag must still be it. Another host, or a mirror with ETags of another kind, says nothing of the pin."""
    sent, pinned = plain_tag(tag), plain_tag(asked.file.pin)
    if sent == pinned or asked.moved or not _HASH.fullmatch(sent) or not _HASH.fullmatch(pinned):
        return
    if len(sent.partition("-")[0]) == len(pinned.partition("-")[0]):
        raise changed(asked, f"has the ETag {sent}, and {pinned} was listed")


def plain_tag(tag: str) -> str:
    return tag.strip().removeprefix("W/").strip('"').lower()


def changed(asked: Asked, how: str) -> SourceUnavailable:
    what = f"{asked.file.name} changed at {asked.host} since it was listed: it {how}"
    return SourceUnavailable("source_changed", what, "It is listed anew by the next attempt.")


def final(asked: Asked, status: int, origin: str) -> VllmdError:
    """A refusal for which the source has no words of its own."""
    if status in (412, 416):
        return changed(asked, f"is refused with {status}")
    what = f"{asked.host} answered {status} for {asked.file.name} of {origin}"
    if status in _PERMISSION:
        return PermissionMissing("source_refused", what, _PERMISSION[status])
    return ModelNotFound("source_refused", what, "It was listed, and is gone: upload it again." if status in (404, 410) else "Look at the server's own log.")


def retry_after(text: str) -> float:
    """Seconds, of both forms that the header has; 0 for what is none. Never more than 5 minutes."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(min(int(text[:9]), LONGEST_WAIT_S))
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT_S)


def back_off(failures: int, first_s: float) -> float:
    """How long to wait after the n-th failure in a row: doubling, to a minute, and scattered, so that many clients do not return at once."""
    return float(min(first_s * 2 ** (failures - 1), 60.0) * random.uniform(0.5, 1.0))
