"""Letting one more group use a file of ours."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

ACL = "system.posix_acl_access"
_VERSION = 2
_ENTRY = "<HHI"
_USER_OBJ, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x04, 0x08, 0x10, 0x20
_READ_WRITE, _NOBODY = 6, 0xFFFFFFFF


def admit_group(path: Path, group: int) -> None:
    """Members may read and write `path`, which is ours with mode 0660, and nobody else but the owner and its group.

    By an access control list: the unit's sandbox refuses chown(2), which is also refused to whoever is not in that group.
    Where the file system knows no lists, by chown all the same; where both are refused, the group is left out."""
    entries = ((_USER_OBJ, _READ_WRITE, _NOBODY), (_GROUP_OBJ, _READ_WRITE, _NOBODY), (_GROUP, _READ_WRITE, group), (_MASK, _READ_WRITE, _NOBODY), (_OTHER, 0, _NOBODY))
    value = struct.pack("<I", _VERSION) + b"".join(struct.pack(_ENTRY, *entry) for entry in entries)
    try:
        os.setxattr(path, ACL, value, follow_symlinks=False)
    except OSError:
        with contextlib.suppress(OSError):
            os.chown(path, -1, group)
