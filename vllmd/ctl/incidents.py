"""`vllmctl incidents NAME [ID]`: what instances left when they failed.

The files belong to the service's user, and root reads them: nothing is followed, everything is bounded, and no character
of theirs reaches the terminal that is not printable.

JSON, schema 1: the list is {"schema": 1, "instance", "directory", "items": [summary, ...]}, the newest first; one incident is its
summary with "texts": {file: content}.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.values import finite_json, printable
from vllmd.ctl import unit as units
from vllmd.ctl.files import number, text
from vllmd.errors import PermissionMissing, StorageFailed, UsageError
from vllmd.instance.incident_store import FOLDER, SEEN, SUMMARY, SUMMARY_BYTES, listed

PART_BYTES, PARTS, SHOWN_LINES = 4 << 20, 24, 60
_PART = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}\.(?:txt|log|json)")
_FIRST = ("cause.txt", "engine.log", "stacks.txt", "processes.txt", "waits.txt", "cgroup.txt", "kernel.txt")
_ALONE = ("config.json", "gpu.json", "metrics.txt")
"""Long, and for a closer look: shown by name only."""


@dataclass(frozen=True, slots=True)
class Folder:
    """instances/NAME/incidents, opened one step at a time, so that no link in it leads anywhere else; -1: there is none."""

    descriptor: int
    path: str

    def names(self) -> list[str]:
        """The incidents, newest first."""
        if self.descriptor < 0:
            return []
        return listed(self.descriptor)[::-1]

    def summary(self, ident: str) -> dict[str, Any]:
        """{} where it cannot be read or understood."""
        try:
            value = finite_json(self.read(ident, SUMMARY, SUMMARY_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        return {**value, "id": ident} if isinstance(value, dict) else {}

    def parts(self, ident: str) -> list[str]:
        with self._incident(ident) as folder, os.scandir(folder) as entries:
            found = [entry.name for _, entry in zip(range(SEEN), entries, strict=False) if _PART.fullmatch(entry.name) and entry.name != SUMMARY]
        order = (*_FIRST, *sorted(set(found) - {*_FIRST, *_ALONE}), *_ALONE)
        return [name for name in order if name in found][:PARTS]

    def read(self, ident: str, name: str, limit_bytes: int = PART_BYTES) -> str:
        """The beginning of a regular file of no other name."""
        with self._incident(ident) as folder:
            return read_at(folder, name, limit_bytes)

    @contextlib.contextmanager
    def _incident(self, ident: str) -> Iterator[int]:
        descriptor = _step(ident, self.descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def read_at(folder: int, name: str, limit_bytes: int) -> str:
    """The beginning of a regular file of no other name, in an open directory. OSError."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with open(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise OSError(errno.EINVAL, "not a regular file", name)
        return file.read(limit_bytes).decode(errors="replace")


def _step(name: str, folder: int) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


@contextlib.contextmanager
def opened(paths: Paths, instance: str, name: str = FOLDER) -> Iterator[Folder]:
    """A directory of that name in the instance's state. PermissionMissing, StorageFailed."""
    path = str(paths.instance_state(instance) / name)
    descriptor = -1
    try:
        descriptor = os.open(paths.state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for step in ("instances", instance, name):
            inner = _step(step, descriptor)
            os.close(descriptor)
            descriptor = inner
    except FileNotFoundError:
        if descriptor >= 0:
            os.close(descriptor)
        descriptor = -1
    except PermissionError as error:
        raise PermissionMissing("permission_missing", f"cannot read {path}: {error.strerror}", "run it as root, or as a member of the service's group") from None
    except OSError as error:
        raise StorageFailed("storage_failed", f"cannot read {path}: {error.strerror}", "look at that path: nothing of it may be a link") from None
    try:
        yield Folder(descriptor, path)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def incidents(paths: Paths, name: str, ident: str | None, *, part: str | None = None, as_json: bool = False) -> int:
    instance = units.instance_name(name)
    with opened(paths, instance) as folder:
        if ident is None:
            _list(folder, instance, as_json=as_json)
            return 0
        found = _one(folder, instance, ident)
        if part is not None:
            sys.stdout.write(_lines(_part(folder, found, part)))
        elif as_json:
            print(json.dumps({"schema": 1, "id": found, **folder.summary(found), "texts": dict(_texts(folder, found))}))
        else:
            sys.stdout.writelines(f"{line}\n" for line in screen(folder, found))
    return 0


def _one(folder: Folder, instance: str, wanted: str) -> str:
    """By its whole name, by its beginning or end (the short id), or 'last'."""
    names = folder.names()
    found = names[:1] if wanted == "last" else [each for each in names if each.startswith(wanted) or each.endswith(wanted)]
    if len(found) != 1:
        what = f"instance {instance} has {'no incident' if not found else f'{len(found)} incidents'} {printable(wanted)[:80]!r}"
        raise UsageError("no_incident", what, f"`vllmctl incidents {instance}` lists them")
    return found[0]


def _part(folder: Folder, ident: str, name: str) -> str:
    try:
        if not _PART.fullmatch(name):
            raise OSError(errno.ENOENT, "no file of an incident")
        return folder.read(ident, name)
    except OSError as error:
        raise UsageError("no_part", f"{printable(name)[:80]}: {error.strerror}", f"its files: {', '.join(folder.parts(ident))}") from None


def _texts(folder: Folder, ident: str) -> Iterator[tuple[str, str]]:
    for name in folder.parts(ident):
        with contextlib.suppress(OSError):
            yield name, folder.read(ident, name)


def _list(folder: Folder, instance: str, *, as_json: bool) -> None:
    items = [folder.summary(ident) or {"id": ident} for ident in folder.names()]
    if as_json:
        print(json.dumps({"schema": 1, "instance": instance, "directory": folder.path, "items": items}))
        return
    if not items:
        print(f"no incidents of instance {instance}")
        return
    width = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else 10_000
    for line in table(items):
        print(line[:width])


def table(items: list[dict[str, Any]]) -> Iterator[str]:
    rows = [("INCIDENT", "CAUSE", "IN A ROW", "WHAT")]
    for item in items:
        code, what = text(item, "code") or "?", text(item, "what") or "its summary cannot be read"
        rows.append((str(item["id"]), _cell(code)[:40], f"{number(item, 'count') or 1:.0f}", _cell(what)))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        yield f"{row[0]:<{wide[0]}}  {row[1]:<{wide[1]}}  {row[2]:>{wide[2]}}  {row[3]}"


def _cell(value: str) -> str:
    return printable(value.replace("\n", " "))[:2000]


def screen(folder: Folder, ident: str) -> Iterator[str]:
    said = folder.summary(ident)
    yield f"incident {ident} of {_cell(text(said, 'instance'))}"
    for name, value in _facts(said):
        if value:
            yield f"{name:>12}  {_cell(value)}"
    yield f"{'files':>12}  {folder.path}/{ident}"
    parts = folder.parts(ident)
    notes = _notes(said)
    for name in parts:
        try:
            content = folder.read(ident, name)
        except OSError as error:
            content = f"cannot be read: {error.strerror}"
        note = f" ({notes[name]})" if notes.get(name) else ""
        yield ""
        yield f"--- {name}{note}"
        if name in _ALONE:
            yield f"{len(content.encode())} bytes: vllmctl incidents {_cell(text(said, 'instance')) or 'NAME'} {ident} --part {name}"
            continue
        yield from _some(_lines(content).splitlines(), name)


def _facts(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "at", text(said, "at")
    yield "cause", text(said, "code")
    yield "what", text(said, "what")
    yield "to do", text(said, "hint")
    yield "status", f"{number(said, 'status') or 0:.0f}"
    yield "while", "serving" if said.get("serving") is True else text(said, "phase")
    yield "engine", " ".join((text(said, "engine", "name"), text(said, "engine", "version"), text(said, "engine_exit")))
    yield "model", text(said, "model", "id")
    count = number(said, "count") or 1
    yield "in a row", f"{count:.0f} times since {text(said, 'since')}; the first: {text(said, 'first')}" if count > 1 else ""
    yield "fingerprint", text(said, "fingerprint")
    yield "launch", text(said, "launch_id")
    lost = said.get("lost")
    yield "missing", ", ".join(f"{name}: {reason}" for name, reason in lost.items()) if isinstance(lost, dict) else ""


def _notes(said: Mapping[str, Any]) -> dict[str, str]:
    listed = said.get("parts")
    items = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return {text(each, "name"): _cell(text(each, "note"))[:200] for each in items}


def _some(lines: list[str], name: str) -> Iterator[str]:
    """Of a log its end, of everything else its beginning."""
    left = len(lines) - SHOWN_LINES
    if left > 0 and name.endswith(".log"):
        yield f"... {left} lines more: --part {name}"
    yield from lines[-SHOWN_LINES:] if name.endswith(".log") else lines[:SHOWN_LINES]
    if left > 0 and not name.endswith(".log"):
        yield f"... {left} lines more: --part {name}"


def _lines(content: str) -> str:
    return printable(content.expandtabs(4)) + ("" if content.endswith("\n") or not content else "\n")
