"""instances/NAME/incidents/: one directory per incident, written under another name and renamed, the newest ones kept.

Beside the newest, the first incident of each series of one and the same failure stays: what a restart leaves looks
different from what began it. A full disk costs the largest parts first, and never the exit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from vllmd.system.files import read_small

FOLDER, SUMMARY = "incidents", "summary.json"
NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{6}")
SUMMARY_BYTES = 256 << 10
_TIME = "%Y%m%dT%H%M%S.%f"
_UNFINISHED = ".new-"
_FOLDER_MODE, _FILE_MODE = 0o750, 0o640
SEEN, LOOKED_AT = 1000, 100_000
"""More incidents than these are nobody's doing of ours; and so many entries, theirs and others', cost a tenth of a second."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file of an incident, and what is to be said of it ('' nothing)."""

    name: str
    content: bytes
    note: str = ""


def new_id(folder: Path | None = None) -> str:
    """The time, but later than the newest incident of `folder`: their names are their order, also where the clock went back."""
    at = datetime.now(UTC)
    newest = names(folder)[-1:] if folder else []
    with contextlib.suppress(ValueError, OverflowError):  # a name that is no time, or the last one
        for name in newest:
            at = max(at, datetime.strptime(name[:19] + "+0000", f"{_TIME}%z") + timedelta(milliseconds=1))
    return at.strftime(_TIME)[:19] + "Z-" + os.urandom(3).hex()


def write(folder: Path, ident: str, parts: Sequence[Part], summary: Mapping[str, Any], *, keep: int) -> str:
    """Makes room, then writes; returns '' or what had to be left out. OSError when not even the summary can be written."""
    folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    prune(folder, keep - 1, str(summary.get("fingerprint", "")))
    temporary = folder / f"{_UNFINISHED}{ident}"
    temporary.mkdir(mode=_FOLDER_MODE)
    try:
        temporary.chmod(_FOLDER_MODE)
        complaint = _write_parts(temporary, parts, summary)
        temporary.rename(folder / ident)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return complaint


def _write_parts(folder: Path, parts: Sequence[Part], summary: Mapping[str, Any]) -> str:
    """The summary comes last and is worth more than any part: for it the largest of them give way."""
    written: list[Part] = []
    lost: dict[str, str] = {}
    for part in parts:
        try:
            _write(folder / part.name, part.content)
            written.append(part)
        except OSError as error:
            (folder / part.name).unlink(missing_ok=True)
            lost[part.name] = error.strerror or str(error)
    while True:
        listed = [{"name": part.name, "bytes": len(part.content), "note": part.note} for part in written]
        document = {**summary, "parts": listed, "lost": lost}
        try:
            _write(folder / SUMMARY, json.dumps(document, ensure_ascii=False, indent=1).encode(errors="replace") + b"\n", sync=True)
            return "; ".join(f"{name}: {reason}" for name, reason in lost.items())
        except OSError as error:
            (folder / SUMMARY).unlink(missing_ok=True)
            if not written:
                raise
            largest = max(written, key=lambda part: len(part.content))
            written.remove(largest)
            lost[largest.name] = error.strerror or str(error)
            (folder / largest.name).unlink(missing_ok=True)


def _write(path: Path, content: bytes, *, sync: bool = False) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
    try:
        os.fchmod(descriptor, _FILE_MODE)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- which are kept


def names(folder: Path) -> list[str]:
    """The incidents there, oldest first."""
    try:
        return listed(folder)
    except OSError:
        return []


def listed(folder: Path | int) -> list[str]:
    """The same of a path or a descriptor. OSError."""
    with os.scandir(folder) as entries:
        ours = (entry.name for entry in islice(entries, LOOKED_AT) if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False))
        return sorted(islice(ours, SEEN))


def prune(folder: Path, keep: int, fingerprint: str) -> None:
    """Keeps the newest `keep` and the first of every series that reaches into them, or that `fingerprint` goes on with."""
    every = names(folder)
    newest = set(every[max(0, len(every) - keep) :])
    stays = newest | firsts(every, {name: _fingerprint(folder / name) for name in every}, newest, fingerprint)
    for name in every:
        if name not in stays:
            shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        for unfinished in folder.glob(f"{_UNFINISHED}*"):  # a supervisor that was killed in the middle
            shutil.rmtree(unfinished, ignore_errors=True)


def firsts(every: Sequence[str], prints: Mapping[str, str], newest: set[str], coming: str) -> set[str]:
    """The first of each run of equal fingerprints that has a member among the newest, or that the coming one goes on with."""
    found: set[str] = set()
    run: list[str] = []
    for name in every:
        if run and (not prints[name] or prints[name] != prints[run[-1]]):
            run = []
        run.append(name)
        if newest & set(run):
            found.add(run[0])
    if run and coming and prints[run[-1]] == coming:
        found.add(run[0])
    return found


def _fingerprint(incident: Path) -> str:
    try:
        value = json.loads(read_small(incident / SUMMARY, SUMMARY_BYTES))
    except (OSError, ValueError, RecursionError):
        return ""
    found = value.get("fingerprint") if isinstance(value, dict) else ""
    return found if isinstance(found, str) else ""
