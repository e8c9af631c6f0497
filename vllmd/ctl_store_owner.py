"""Whose store root may work in.

Who owns a directory may put a link into the way of whoever writes below it, between any look and the write that follows. root
has no business there: the owner can do the same work, and harm nobody by it.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from vllmd.errors import PermissionMissing

SERVICE_USER = "vllmd"
"""User= of the units."""


def check(store: Path) -> None:
    """PermissionMissing where root would change a store of somebody who is neither root, nor the service's user, nor the one
    who called sudo."""
    if os.geteuid() != 0:
        return
    try:
        owner = store.stat().st_uid
    except OSError:
        return  # whoever uses it says so
    if owner in (0, _service(), _sudo()):
        return
    name = _name(owner)
    what = f"{store} belongs to {name}, who could lead root's changes elsewhere"
    raise PermissionMissing("foreign_store", what, f"Run it as its owner: sudo -u {name} vllmctl store ... --dir {store}")


def _service() -> int:
    try:
        return pwd.getpwnam(SERVICE_USER).pw_uid
    except KeyError:
        return 0


def _sudo() -> int:
    said = os.environ.get("SUDO_UID", "")
    return int(said) if said.isascii() and said.isdigit() else 0


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"
