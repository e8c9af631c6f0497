"""Versions that an instance could go back to: STORE/.kept/NAME, the manifest sums of its newest generations, one on a line.

Written by the instance's supervisor when it is READY; retention and `store gc` leave these versions alone. What is no such
sum counts for nothing. The file of an instance that is gone is removed by hand: the listing names it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from vllmd.models.lock import private_directory
from vllmd.system.files import read_small, write_atomic

DIRECTORY = ".kept"
_LIMIT_BYTES = 64 << 10
_SUM = re.compile("[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}")


def write(store: Path, instance: str, versions: Iterable[str]) -> None:
    """Replaces what was said for this instance. OSError, PermissionMissing."""
    wanted = "".join(f"{each}\n" for each in dict.fromkeys(versions) if _SUM.fullmatch(each))
    path = store / DIRECTORY / instance
    if not wanted:
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):
        if read_small(path, _LIMIT_BYTES).decode() == wanted:
            return
    write_atomic(private_directory(store, DIRECTORY) / instance, wanted)
    if os.geteuid() == 0:
        owner = store.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def add(store: Path, instance: str, version: str) -> None:
    """One more, until the instance is READY with it. OSError, PermissionMissing."""
    write(store, instance, [*(each for each, names in read(store).items() if instance in names), version])


def read(store: Path) -> dict[str, tuple[str, ...]]:
    """Manifest sum -> the instances that keep it. A file that cannot be read says nothing. OSError."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        names = sorted(name for name in os.listdir(store / DIRECTORY) if _NAME.fullmatch(name))  # noqa: PTH208 - names are wanted
    except (FileNotFoundError, NotADirectoryError):
        return found
    for name in names:
        with contextlib.suppress(OSError):
            for line in read_small(store / DIRECTORY / name, _LIMIT_BYTES).decode("ascii", "replace").split():
                if _SUM.fullmatch(line):
                    found[line] = (*found.get(line, ()), name)
    return found


def versions(store: Path) -> frozenset[str]:
    """The sums of all kept versions. OSError."""
    return frozenset(read(store))
