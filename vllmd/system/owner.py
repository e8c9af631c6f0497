"""Root's work in a directory of somebody else, done with that one's rights.

Who owns a directory may put a link into the way of whoever writes below it, between any look and the write that follows. With
the owner's rights a link leads nowhere that the owner could not go without us.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def as_owner(path: Path) -> Iterator[None]:
    """Within it, root acts as whoever controls `path`; for everybody else nothing changes. Of the whole process, all threads.

    OSError where the path cannot be looked at.
    """
    user = controller(path) if os.geteuid() == 0 else 0
    if user == 0:
        yield
        return
    group, groups = os.getegid(), os.getgroups()
    primary, others = _groups(user)
    os.setgroups(others)
    os.setegid(primary)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def controller(path: Path) -> int:
    """The uid that can change what `path` leads to: the first that is not root, from the top down, also on the way that links
    show; 0 where only root can. What does not exist yet belongs to whoever has the directory above."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow the links, which are to be looked at
    for way in (absolute, Path(os.path.realpath(absolute))):
        for place in (*reversed(way.parents), way):
            try:
                owner = place.lstat().st_uid
            except FileNotFoundError:
                break
            if owner != 0:
                return owner
    return 0


def rights(path: Path) -> dict[str, Any]:
    """For subprocess, where root runs a program: as whoever controls it, who would otherwise be root from then on. OSError."""
    user = controller(path) if os.geteuid() == 0 else 0
    if user == 0:
        return {}
    group, groups = _groups(user)
    return {"user": user, "group": group, "extra_groups": groups}


def _groups(user: int) -> tuple[int, list[int]]:
    """The primary group and all groups; of a uid that no user has, the group of the same number, as containers have it."""
    try:
        entry = pwd.getpwuid(user)
    except KeyError:
        return user, []
    return entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)
