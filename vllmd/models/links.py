"""The links of the store: STORE/<label>, which says what is published, and the names for people and other tools.

A link is swapped by one rename. What lies under <label> and is no link is moved to <label>.bak.RANDOM, from where `recover`
puts it back if we end before the link is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from vllmd.models.places import present
from vllmd.models.store import PUBLISHED

Tell = Callable[[str], None]
TEMPORARY = ".link."
_TAKEN = ("hub",)
"""Names in the store that have a meaning of their own."""


def swap(store: Path, name: str, directory: Path, tell: Tell) -> None:
    """STORE/NAME leads to the version from now on, whatever it was before. Not yet durable. OSError."""
    link = store / name
    if os.path.lexists(link) and not link.is_symlink():
        aside = store / f"{name}.bak.{os.urandom(4).hex()}"
        link.rename(aside)
        tell(f"{link} was no link to a published version; it is kept as {aside.name}")
    _replace(link, directory)


def point(store: Path, name: str, directory: Path, tell: Tell) -> None:
    """Let STORE/NAME lead to the version too, while nothing else has that name: nothing at all, a link to another version of
    this model, or one to a version that is gone. Where that cannot be done it is said, and nothing else happens."""
    if name in _TAKEN or name.startswith(".") or "/" in name or name == directory.parent.name:
        return
    link = store / name
    try:
        if not present(link) or _is_ours(link, directory):
            _replace(link, directory)
    except OSError as error:
        tell(f"{link} could not be made to lead to {directory}: {error.strerror}")


def _is_ours(link: Path, directory: Path) -> bool:
    if not link.is_symlink():
        return False
    parts = link.readlink().parts
    if len(parts) != 3 or parts[0] != PUBLISHED:
        return False
    return parts[1] == directory.parent.name or not link.exists()


def _replace(link: Path, directory: Path) -> None:
    """Made among what is published, where only the holder of the lock writes, so the next one can clear it away."""
    target = os.fspath(directory.relative_to(link.parent))
    if link.is_symlink() and os.fspath(link.readlink()) == target:
        return
    temporary = directory.parent / f"{TEMPORARY}{os.urandom(6).hex()}"
    temporary.symlink_to(target)
    try:
        if os.geteuid() == 0:
            owner = link.parent.stat()
            os.chown(temporary, owner.st_uid, owner.st_gid, follow_symlinks=False)
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clear_unfinished(home: Path) -> None:
    """Links that were made and not yet moved to their place when somebody was killed. Needs the lock. OSError."""
    for path in home.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def leading_to(store: Path) -> dict[str, list[Path]]:
    """Real path -> the store's own links that lead there. OSError."""
    found: dict[str, list[Path]] = {}
    with os.scandir(store) as entries:
        for entry in entries:
            if entry.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # removed between two looks
                    found.setdefault(os.path.realpath(entry.path), []).append(Path(entry.path))
    return found
