"""`vllmctl store rm`: removes what the listing shows, after a look at who uses it and a question to the person."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from vllmd.ctl.store import Place
from vllmd.ctl.store_chosen import changing, look, named, shown
from vllmd.ctl.store_users import Users
from vllmd.errors import TryLater, UsageError
from vllmd.models import amounts, discard, pins, retention
from vllmd.models.catalog import HUB_KIND, LOCAL_KIND, PUBLISHED_KIND, Item
from vllmd.models.retention import InUse, Removed


def remove(place: Place, names: Iterable[str], version: str | None, *, is_confirmed: bool, is_forced: bool) -> int:
    """Nothing is removed unless all of it may be. TryLater where something is in use, UsageError, ModelNotFound."""
    found, users = look(place), Users.look(place.paths)
    items = list({item.directory: item for name in names for item in _removable(named(found, name, version))}.values())
    for item in items:
        _check(item, users, is_forced=is_forced)
    if not is_confirmed and not _confirmed(items):
        sys.stdout.write("nothing was removed\n")
        return 0
    for item in items:
        _remove(place, item)
    return 0


def _removable(items: list[Item]) -> list[Item]:
    removable = [item for item in items if item.kind != LOCAL_KIND]
    if not removable:
        what = f"{shown(items[0].name)} is a directory of your own ({shown(str(items[0].directory))}): only what was fetched is removed"
        raise UsageError("users_own", what, "remove it yourself, if no instance serves it")
    return removable


def _check(item: Item, users: Users, *, is_forced: bool) -> None:
    used = users.of(item)
    if used:
        raise TryLater("model_in_use", f"{describe(item)} is in use by {', '.join(used)}", _release(used[0]))
    if item.is_pinned and not is_forced:
        hint = f"vllmctl store unpin {shown(item.identity)} --version {item.version[:12]}, or --force"
        raise UsageError("model_pinned", f"{describe(item)} is pinned", hint)
    if item.kept_for and not is_forced:
        what = f"{describe(item)} is kept for a rollback of {', '.join(item.kept_for)}"
        raise UsageError("model_kept", what, f"--force removes it all the same; `vllmctl generations {item.kept_for[0]}` says what needs it")


def _release(user: str) -> str:
    """Instances have a name, which is one word; everything else is a process of somebody's."""
    if " " in user:
        return "Wait until it has ended, or end it, and try again."
    return f"stop that first, as with: vllmctl stop {user}"


def describe(item: Item) -> str:
    """'acme/Tiny, version 0123456789ab'."""
    if item.kind == PUBLISHED_KIND:
        return f"{shown(item.identity)}, version {item.version[:12]}"
    return f"{shown(item.identity)} in the hub cache" if item.kind == HUB_KIND else f"the unfinished download of {shown(item.identity)}"


def _confirmed(items: list[Item]) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("not_confirmed", "nobody can be asked, as standard input is no terminal", "--yes removes without a question")
    for item in items:
        sys.stderr.write(f"  {describe(item)}: {amounts.size(item.bytes)}{', pinned' if item.is_pinned else ''}\n")
    sys.stderr.write("Remove? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _remove(place: Place, item: Item) -> None:
    result = removed(place, item)
    if isinstance(result, InUse):
        raise TryLater("model_in_use", f"{describe(item)} stays: it {result.reason}", "`vllmctl store list` says by whom")
    sys.stdout.write(f"Removed {describe(item)}: {amounts.size(result.bytes)} freed\n")


def removed(place: Place, item: Item) -> Removed | InUse:
    """Removes one entry, whatever its kind, unless somebody uses it. StorageFailed, PermissionMissing."""
    with changing(place, f"remove {item.directory} from"):
        if item.kind == HUB_KIND:
            return discard.remove_hub(place.store, item)
        if item.kind != PUBLISHED_KIND:
            return discard.remove_unfinished(place.store, item)
        result = retention.remove_version(place.store, item.directory)
        if isinstance(result, Removed):
            pins.unpin(place.store, item.version)
        return result
