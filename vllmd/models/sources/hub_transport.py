"""Requests for pieces of the files at the listed commit. models/download follows to wherever the hub keeps them, and tells the
token to nobody there."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from vllmd import __version__
from vllmd.errors import SourceUnavailable, VllmdError
from vllmd.models.remote import RemoteFile, Request
from vllmd.models.sources import hub_errors
from vllmd.models.sources.hub_errors import Answer, Place

_MAX_BODY = 4096


@dataclass(frozen=True, slots=True)
class HubTransport:
    """`commit` is what `place.revision` was when it was listed: a push meanwhile changes nothing."""

    place: Place
    commit: str

    def request(self, file: RemoteFile, begin: int, end: int) -> Request:
        headers = {"Accept-Encoding": "identity", "User-Agent": f"vllmd/{__version__}"}
        if self.place.token:
            headers["Authorization"] = f"Bearer {self.place.token}"
        if end > begin:
            headers["Range"] = f"bytes={begin}-{end - 1}"
        return Request(self.url(file), headers)

    def url(self, file: RemoteFile) -> str:
        return f"{self.place.url}/resolve/{self.commit}/{quote(file.name, safe='/')}"

    def refused(self, file: RemoteFile, status: int, body: bytes) -> VllmdError | None:
        """By status and text: the hub's own code is in a header. None for what is not about permission."""
        if status not in (401, 403, 404, 410, 451):
            return None
        text = body[:_MAX_BODY].decode("utf-8", "replace")
        message = "" if text.lstrip().startswith("<") else text  # a store's XML, a proxy's HTML
        answer = Answer(status, "", message, what=self.url(file))
        if status in (404, 410):
            what = f"{answer.what}: {self.place.host} answers {status}, though it was listed"
            return SourceUnavailable("source_changed", what, "It may have been removed meanwhile; it is listed again.")
        if text.lstrip().startswith("<") and not self.place.is_gated:
            return None
        return hub_errors.of_answer(answer, self.place)
