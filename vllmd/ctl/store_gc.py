"""`vllmctl store gc`: what nobody needs any more goes: surplus versions, abandoned downloads, rubbish."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from vllmd.ctl.store import Place
from vllmd.ctl.store_chosen import changing, look, permitted
from vllmd.ctl.store_remove import describe, removed
from vllmd.ctl.store_users import Users
from vllmd.errors import ModelInvalid, PermissionMissing, StorageFailed, VllmdError
from vllmd.models import amounts, discard, leftovers
from vllmd.models.catalog import PUBLISHED_KIND, Catalog, Item
from vllmd.models.ioerrors import explained
from vllmd.models.measure import measured
from vllmd.models.retention import InUse, Removed


@dataclass(frozen=True, slots=True)
class Work:
    """One thing to remove. `act` returns None where there was nothing to do any more."""

    what: str
    bytes: int
    act: Callable[[], Removed | InUse | None]


def collect(place: Place, keep: int, *, is_dry: bool) -> int:
    """Says what goes and what it gives back. At the end StorageFailed or PermissionMissing, where something could not be removed."""
    found = look(place)
    for line in _keepers_gone(place, found):
        sys.stdout.write(f"{line}\n")
    with permitted(place, "read"):
        work = list(_work(place, found, Users.look(place.paths), keep))
    if is_dry:
        for each in work:
            sys.stdout.write(f"would remove {each.what}: {amounts.size(each.bytes)}\n")
        sys.stdout.write(f"{amounts.size(sum(each.bytes for each in work))} could be freed\n" if work else "nothing to remove\n")
        return 0
    with changing(place, "clean up"):
        _done(work)
    return 0


def _keepers_gone(place: Place, found: Catalog) -> Iterator[str]:
    """Not taken away by itself: the instance may be one of another host that shares the store."""
    for name in sorted({keeper for item in found.items for keeper in item.kept_for}):
        if not os.path.lexists(place.paths.instance_config(name)):
            yield f"versions are kept for a rollback of {name}, which has no configuration here; if it is gone: {place.paths.vllmctl} forget {name}"


def _done(work: list[Work]) -> None:
    freed, gone = 0, 0
    failed: list[VllmdError] = []
    for each in work:
        try:
            with explained(f"remove {each.what}"):
                result = each.act()
        except (StorageFailed, PermissionMissing) as error:
            failed.append(error)
            continue
        except ModelInvalid:  # it is gone already: publications clean up too
            continue
        if isinstance(result, InUse):
            sys.stdout.write(f"{each.what} stays: it {result.reason}\n")
        elif result is not None:
            freed, gone = freed + result.bytes, gone + 1
            sys.stdout.write(f"Removed {each.what}: {amounts.size(result.bytes)} freed\n")
    sys.stdout.write(f"{amounts.size(freed)} freed\n" if gone else "nothing to remove\n")
    if failed:
        raise failed[0]


def _work(place: Place, found: Catalog, users: Users, keep: int) -> Iterator[Work]:
    store = place.store
    for path in discard.rubbish(store):
        yield _deletion(path, "what an interrupted removal left", _bytes(path))
    for item in surplus(found, keep):
        used = users.of(item)
        if used:
            sys.stdout.write(f"{describe(item)} stays: it is in use by {', '.join(used)}\n")
        else:
            yield Work(describe(item), item.size.own_bytes, partial(removed, place, item))
    for stale in leftovers.stale_stages(store):
        days = int(stale.age_s // 86400)
        yield Work(f"the download of {stale.label} that ended {days} days ago", stale.bytes, partial(leftovers.remove_stage, store, stale))
    for path in discard.orphans(store):
        yield _deletion(path, f"{path.name}, which is of a directory that is gone", _bytes(path))
    for home in discard.bare_homes(store):
        yield Work(f"{home.name}, which has no version", 0, partial(_home_removed, store, home))


def _home_removed(store: Path, home: Path) -> Removed | None:
    return Removed(home, 0) if discard.remove_home(store, home) else None


def _bytes(path: Path) -> int:
    """0 for what vanished meanwhile or may not be looked into."""
    try:
        return measured(path).own_bytes if path.is_dir() else path.lstat().st_size
    except OSError:
        return 0


def _deletion(path: Path, what: str, size: int) -> Work:
    return Work(what, size, lambda: Removed(path, discard.delete(path)))


def surplus(found: Catalog, keep: int) -> list[Item]:
    """Versions beyond the newest `keep` of each identity: never what a link leads to, nor what is pinned, nor what an instance
    could go back to."""
    versions = sorted((item for item in found.items if item.kind == PUBLISHED_KIND), key=lambda item: item.name)
    old: list[Item] = []
    for _, group in groupby(versions, key=lambda item: item.name):
        ranked = sorted(group, key=lambda item: (item.is_current, item.created_at), reverse=True)
        old += [item for item in ranked[keep:] if not (item.is_current or item.is_pinned or item.kept_for or item.names)]
    return old
