"""What a source on a network offers: a listing of files, and how to ask for a piece of one.

The one who lists (a source, through its library) and the one who moves the bytes (models/download) meet here only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as its source lists it. Hostile input: `name` is checked by models/listing before anything is written.

    `pin` is what changes when the file does (an ETag, a blob's id), '' where the source has nothing of the kind. `sums` are
    the source's own, algorithm to hex: sha256 (LFS), git-sha1 (a blob of git: SHA-1 of 'blob SIZE\\0' and the bytes), md5,
    crc32c, crc64nvme, ... of the whole file. `key` is the source's own name for it (an object's key, a path).
    """

    name: str
    size: int
    pin: str = ""
    sums: Mapping[str, str] = field(default_factory=dict)
    key: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything that the source has of the model. `origin` is for people and for the manifest (s3://BUCKET/PREFIX,
    https://HOST/ORG/NAME), never with credentials in it; `revision` the commit where there is one."""

    files: tuple[RemoteFile, ...]
    origin: str
    revision: str = ""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Request:
    """A GET. The headers may hold secrets: never shown, and not sent on to another host than the URL's."""

    url: str
    headers: Mapping[str, str]


class Transport(Protocol):
    """How the bytes of a listing are asked for."""

    def request(self, file: RemoteFile, begin: int, end: int) -> Request:
        """For bytes [begin, end) of the file, as it was listed (If-Match where the source has it). Asked for each attempt, from
        several threads at once, so that no signature is too old."""

    def refused(self, file: RemoteFile, status: int, body: bytes) -> Exception | None:
        """What a final 4xx means, as an error of our tree that is not worth a retry; None where the general words are enough."""


class Summed(Protocol):
    """What a transport may have besides: sums that would cost a question each in the listing (HeadObject of S3)."""

    def sums(self, file: RemoteFile) -> Mapping[str, str]:
        """Algorithm to hex, of the whole file, as in RemoteFile.sums; {} where there are none or they cannot be had. Asked once
        for a file that is about to be fetched, from several threads at once; never raises."""


def known_sums(transport: Transport, file: RemoteFile) -> Mapping[str, str]:
    """All that the source can say of the file: the listing's sums, and those that the transport finds out (one question)."""
    ask = getattr(transport, "sums", None)
    return {**(ask(file) if ask is not None else {}), **file.sums}
