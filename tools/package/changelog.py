"""The packages' changelog, from NEWS.md: one entry for each release, a line for each thing that users see."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime

_RELEASE = re.compile(r"## (?P<version>\S+)(?: \((?P<date>[^)]*)\))?")


@dataclass(frozen=True, slots=True)
class Changes:
    news: str
    version: str
    release: str
    epoch: int
    packager: str

    def entries(self) -> Iterator[tuple[str, datetime, list[str]]]:
        """The version that is built comes first, whatever NEWS.md calls it."""
        told = list(_releases(self.news))
        if not told or told[0][0] != self.version:
            yield self.version, self._built(), [f"Package of {self.version}."]
        for version, date, notes in told:
            yield version, date or self._built(), notes

    def _built(self) -> datetime:
        return datetime.fromtimestamp(self.epoch, UTC)

    def for_nfpm(self) -> str:
        """JSON is YAML."""
        return json.dumps(
            [
                {"semver": version, "date": date.isoformat(), "packager": self.packager, "changes": [{"note": note} for note in notes]}
                for version, date, notes in self.entries()
            ]
        )

    def for_debian(self) -> str:
        return "\n".join(
            f"vllmd ({version}-{self.release}) unstable; urgency=medium\n\n{_items(notes)}\n\n -- {self.packager}  {format_datetime(date)}\n"
            for version, date, notes in self.entries()
        )


def _items(notes: list[str]) -> str:
    wrapped = (textwrap.wrap(note, 76, initial_indent="  * ", subsequent_indent="    ", break_on_hyphens=False) for note in notes)
    return "\n".join(line for lines in wrapped for line in lines)


def _releases(news: str) -> Iterator[tuple[str, datetime | None, list[str]]]:
    for part in re.split(r"(?m)^(?=## )", news)[1:]:
        head, _, body = part.partition("\n")
        match = _RELEASE.match(head)
        if match:
            yield match["version"], _date(match["date"] or ""), _notes(body)


def _date(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:  # "unreleased"
        return None


def _notes(body: str) -> list[str]:
    return [" ".join(item.split()).replace("`", "") for item in re.split(r"(?m)^- ", body)[1:]]
