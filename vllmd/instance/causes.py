"""causes.json: how often an instance has failed, by cause, and its last failures: what one life cannot know of the others."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllmd.system.files import read_small, write_atomic

NAME, SCHEMA = "causes.json", 1
LAST = 20
_LIMIT_BYTES = 64 << 10
_CODES = 100
"""Codes are ours; a file with more of them is not."""


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One failure; `incident` '' where none was written. Of a series of the same failure: which in a row this is, when
    it began, and the incident of its first."""

    at: str
    code: str
    fingerprint: str
    incident: str = ""
    count: int = 1
    since: str = ""
    first: str = ""


@dataclass(frozen=True, slots=True)
class Causes:
    """`restarts` counts by code; `last` are the newest, oldest first."""

    restarts: dict[str, int] = field(default_factory=dict)
    last: tuple[Occurrence, ...] = ()

    def next(self, at: str, code: str, fingerprint: str, incident: str) -> Occurrence:
        """The coming failure, as one of a series if it is the same as the last."""
        before = self.last[-1] if self.last else None
        if before is None or not fingerprint or before.fingerprint != fingerprint:
            return Occurrence(at, code, fingerprint, incident, 1, at, incident)
        return Occurrence(at, code, fingerprint, incident, before.count + 1, before.since or before.at, before.first or before.incident or incident)


def read(directory: Path) -> Causes:
    """What is there, as far as it can be understood."""
    try:
        value = json.loads(read_small(directory / NAME, _LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return Causes()
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return Causes()
    restarts, last = value.get("restarts"), value.get("last")
    counts = {str(code)[:64]: count for code, count in list(restarts.items())[:_CODES] if type(count) is int} if isinstance(restarts, dict) else {}
    return Causes(counts, tuple(each for item in (last if isinstance(last, list) else [])[-LAST:] if (each := _occurrence(item))))


def _occurrence(value: Any) -> Occurrence | None:
    names = ("at", "code", "fingerprint", "incident")
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in names):
        return None
    count = value.get("count")
    more = {name: text[:200] for name in ("since", "first") if isinstance(text := value.get(name), str)}
    return Occurrence(**{name: value[name][:200] for name in names}, **more, count=count if type(count) is int and 0 < count < 1 << 40 else 1)


def note(directory: Path, occurrence: Occurrence) -> str:
    """Adds a failure; returns '' or why it could not be written."""
    known = read(directory)
    restarts = {**known.restarts, occurrence.code: known.restarts.get(occurrence.code, 0) + 1}
    document = {"schema": SCHEMA, "restarts": restarts, "last": [asdict(each) for each in (*known.last, occurrence)[-LAST:]]}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / NAME, json.dumps(document, ensure_ascii=False, indent=1) + "\n", fsync=False)
    except OSError as error:
        return f"cannot write {directory / NAME}: {error.strerror}"
    return ""
