"""What a person means by a name: entries of the listing, and nothing else. No name is ever made a path of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from vllmd.config.values import printable
from vllmd.ctl.store import Place
from vllmd.errors import ConfigError, ModelNotFound, PermissionMissing, UsageError
from vllmd.models import catalog
from vllmd.models.catalog import PUBLISHED_KIND, Catalog, Item
from vllmd.models.ioerrors import explained, user_name
from vllmd.models.places import is_directory, present
from vllmd.system.owner import as_owner

_VERSION = re.compile(r"[0-9a-f]{6,64}")
LIST = "vllmctl store list shows what is"
_SHOWN = 1000


@contextmanager
def permitted(place: Place, what: str) -> Iterator[None]:
    """What the file system refuses becomes one of our errors; a missing permission says who may."""
    try:
        with explained(f"{what} {place.store}"):
            yield
    except PermissionMissing as error:
        if error.code == "model_not_permitted":
            owner = _owner(place)
            error.hint = f"Run it as root (sudo vllmctl store ...){f' or as {owner}' if owner else ''}; this is {user_name()}."
        raise


@contextmanager
def changing(place: Place, what: str) -> Iterator[None]:
    """`permitted`, for what writes: root has the rights of the store's owner there, who may be the service's user."""
    with permitted(place, what), as_owner(place.store):
        yield


def _owner(place: Place) -> str:
    import pwd

    try:
        return pwd.getpwuid(place.store.stat().st_uid).pw_name
    except (OSError, KeyError):
        return ""


def look(place: Place) -> Catalog:
    with permitted(place, "read"):
        if present(place.store) and not is_directory(place.store):
            raise ConfigError("bad_place", f"{place.store} is no directory", "correct --dir, or model.dir of the configuration")
        return catalog.take(place.store)


def named(found: Catalog, name: str, version: str | None) -> list[Item]:
    """The entries of that name, and of that version where one is given. ModelNotFound, UsageError."""
    items = found.called(name)
    if not items:
        raise ModelNotFound("not_in_store", f"{shown(name)} is not in the store {found.store}", LIST)
    return items if version is None else [_version(items, name, version)]


def _version(items: list[Item], name: str, version: str) -> Item:
    if not _VERSION.fullmatch(version):
        raise UsageError("usage", f"--version: {shown(version)} is no version", "give the hex digits that list shows, 6 or more of them")
    matching = [item for item in items if item.version.startswith(version)]
    if not matching:
        raise ModelNotFound("not_in_store", f"{shown(name)} has no version {version}", LIST)
    if len(matching) > 1:
        raise UsageError("ambiguous", f"{len(matching)} versions of {shown(name)} begin with {version}", "give more of its digits, or the name with its @revision")
    return matching[0]


def one_version(found: Catalog, name: str, version: str | None) -> Item:
    """The published version that is meant: the one that is given, the only one, or the current one."""
    items = [item for item in named(found, name, version) if item.kind == PUBLISHED_KIND]
    if not items:
        raise UsageError("not_published", f"{shown(name)} is no published version: nothing ever removes it by itself", LIST)
    return only(items, name)


def only(items: list[Item], name: str) -> Item:
    """The one of several that is meant without saying so: the current one. UsageError where that is not clear."""
    current = [item for item in items if item.is_current] or items
    if len(current) > 1:
        which = ", ".join(item.version[:12] or item.name for item in current[:5])
        raise UsageError("ambiguous", f"{shown(name)} is {len(current)} entries of the store: {which}", "give --version, or the name with its @revision")
    return current[0]


def shown(text: str) -> str:
    """For a line of a terminal. A long one keeps its end: of a path that is the file's name."""
    text = printable(text)
    return text if len(text) <= _SHOWN else "..." + text[3 - _SHOWN :]
