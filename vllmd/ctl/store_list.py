"""`vllmctl store list`: one line for each entry, aligned, and what all of it takes.

JSON, schema 1: {"schema": 1, "store": path, "bytes": on the disk, "free_bytes": of its file system, "items": [...]}; an item is

    kind          published, hub-cache, local (a directory of the user's own), unfinished (a download or import)
    id, identity  ORG/NAME, and with @REVISION where one was asked for
    name          its name in the store; names: links of the store that lead to it
    directory     where it lies
    revision      the commit, where one is known; version: the manifest's SHA-256, of published ones
    files, bytes  of them shared_bytes are other entries' too (hard links)
    current       whether it is what a start takes; pinned: whether it stays whatever comes
    kept_for      instances whose newest generations have it: they could go back to it
    damaged       files that were found to be wrong
    used_by       instances by name, other processes as 'COMMAND (pid N)'
    last_used     UTC, ISO 8601; created_at: when it was published; source, origin: where it came from
    notes         what else a person should know
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllmd.ctl.store import Place
from vllmd.ctl.store_chosen import look
from vllmd.ctl.store_users import Users
from vllmd.models import amounts
from vllmd.models.catalog import Catalog, Item
from vllmd.models.places import is_directory

_HEADS = ("MODEL", "KIND", "REVISION", "VERSION", "SIZE", "LAST USE", "")
_RIGHT = ("SIZE",)
_COMMIT_CHARS = 40
_SHORT = 12


def show(place: Place, *, as_json: bool) -> int:
    found = look(place)
    users = Users.look(place.paths)
    if as_json:
        sys.stdout.write(json.dumps(document(found, users)) + "\n")
    else:
        sys.stdout.write("\n".join(lines(found, users)) + "\n")
    return 0


def document(found: Catalog, users: Users) -> dict[str, Any]:
    items = [as_dict(found, item, users) for item in found.items]
    return {"schema": 1, "store": str(found.store), "bytes": found.bytes, "free_bytes": _free_bytes(found.store), "items": items}


def as_dict(found: Catalog, item: Item, users: Users) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "id": item.id,
        "identity": item.identity,
        "name": item.name,
        "names": list(item.names),
        "directory": str(item.directory),
        "revision": item.revision,
        "version": item.version,
        "files": item.size.files,
        "bytes": item.bytes,
        "shared_bytes": found.shared_bytes(item),
        "current": item.is_current,
        "pinned": item.is_pinned,
        "kept_for": list(item.kept_for),
        "damaged": list(item.damaged),
        "used_by": list(users.of(item)),
        "last_used": datetime.fromtimestamp(item.last_used, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "created_at": item.created_at,
        "source": item.source,
        "origin": item.origin,
        "notes": list(item.notes),
    }


def lines(found: Catalog, users: Users) -> Iterator[str]:
    """What a person reads."""
    if not found.items:
        where = f"{found.store} holds no models" if is_directory(found.store) else f"{found.store} does not exist yet: it holds no models"
        yield f"{where}; `vllmd resolve NAME` or the first start of an instance fetches its model"
        return
    now = time.time()
    yield from table([_HEADS, *(_cells(item, users, now) for item in found.items)])
    yield ""
    yield _total(found)


def _cells(item: Item, users: Users, now: float) -> tuple[str, ...]:
    revision = item.revision[:_SHORT] if len(item.revision) == _COMMIT_CHARS else item.revision
    return (item.identity, item.kind, revision, item.version[:_SHORT], amounts.size(item.bytes), _ago(now - item.last_used), _state(item, users))


def _state(item: Item, users: Users) -> str:
    used = users.of(item)
    words = ["current"] if item.is_current else []
    words += ["pinned"] if item.is_pinned else []
    words += [f"kept for a rollback of {', '.join(item.kept_for)}"] if item.kept_for else []
    words += [f"used by {', '.join(used)}"] if used else []
    words += [f"DAMAGED: {item.damaged[0]}{f' and {len(item.damaged) - 1} more' if len(item.damaged) > 1 else ''}"] if item.damaged else []
    return ", ".join((*words, *item.notes))


def table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Aligned columns; one that nobody fills is left out. The first row has the heads."""
    filled = [index for index in range(len(rows[0])) if any(row[index] for row in rows[1:])]
    widths = {index: max(len(row[index]) for row in rows) for index in filled}
    for row in rows:
        cells = (row[index].rjust(widths[index]) if rows[0][index] in _RIGHT else row[index].ljust(widths[index]) for index in filled)
        yield "  ".join(cells).rstrip()


def _total(found: Catalog) -> str:
    count = len(found.items)
    shared = sum(item.bytes for item in found.items) - found.bytes
    noted = f" ({amounts.size(shared)} more if they shared no files)" if shared else ""
    free = _free_bytes(found.store)
    room = f", {amounts.size(free)} free" if free is not None else ""
    return f"{count} {'entry' if count == 1 else 'entries'}, {amounts.size(found.bytes)}{noted}{room} in {found.store}"


def _free_bytes(store: Path) -> int | None:
    try:
        room = os.statvfs(store)
    except OSError:
        return None
    return room.f_bavail * room.f_frsize


def _ago(seconds: float) -> str:
    """'5 min ago'; what lies in the future by a clock that was set is 'now'."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {name} ago"
    return "now"
