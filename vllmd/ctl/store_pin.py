"""`vllmctl store pin|unpin`: which versions stay, whatever is fetched after them."""

from __future__ import annotations

import sys

from vllmd.ctl.store import Place
from vllmd.ctl.store_chosen import changing, look, one_version
from vllmd.ctl.store_remove import describe
from vllmd.errors import ModelNotFound, UsageError
from vllmd.models import pins


def pin(place: Place, name: str, version: str | None) -> int:
    item = one_version(look(place), name, version)
    with changing(place, "write"):
        is_new = pins.pin(place.store, item.directory)
    sys.stdout.write(f"{describe(item)} is pinned{'' if is_new else ' already'}\n")
    return 0


def unpin(place: Place, name: str, version: str | None) -> int:
    """Without --version the only pinned version of that name."""
    found = look(place)
    chosen = [item for item in found.called(name) if item.is_pinned]
    if version is not None or len(chosen) != 1:
        item = one_version(found, name, version)
        if version is None and len(chosen) > 1:
            which = ", ".join(each.version[:12] for each in chosen)
            raise UsageError("ambiguous", f"{len(chosen)} versions of {describe(item).partition(',')[0]} are pinned: {which}", "give --version")
        chosen = [item]
    with changing(place, "write"):
        was_pinned = pins.unpin(place.store, chosen[0].version)
    if not was_pinned:
        raise ModelNotFound("not_pinned", f"{describe(chosen[0])} is not pinned", "vllmctl store list shows what is")
    sys.stdout.write(f"{describe(chosen[0])} is no longer pinned\n")
    return 0
