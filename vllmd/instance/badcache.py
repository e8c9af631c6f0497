"""A cache of compiled code that breaks every start: moved aside once, so that the next start compiles anew.

Once: a second time it cannot have been the cache. The marker goes when the instance has become ready.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from vllmd.system.files import write_atomic
from vllmd.system.threads import in_thread

MARKER = "cache-moved.json"
_BAD = ".bad-"


def is_marked(state: Path) -> bool:
    return (state / MARKER).exists()


def forget(state: Path) -> None:
    """The instance is ready: the cache is good. OSError."""
    (state / MARKER).unlink(missing_ok=True)


async def move_aside(state: Path, root: Path, caches: Sequence[Path], quote: str, ident: str) -> tuple[Path, Path] | None:
    """(from, to) of what was renamed; None where there is nothing to move, or it was tried before. OSError.

    `caches` are directories below `root`, vllmd's own cache; of several the one that the engine's words name counts.
    """
    moved = await in_thread(lambda: _move(state, root, caches, quote, ident))
    if moved is not None:
        with contextlib.suppress(RuntimeError):  # no thread can be started: the next time
            threading.Thread(target=_remove_older, args=moved, daemon=True, name="vllmd-blocking").start()
    return moved


def _move(state: Path, root: Path, caches: Sequence[Path], quote: str, ident: str) -> tuple[Path, Path] | None:
    inside = [each for each in caches if each.is_dir() and not each.is_symlink() and root in each.parents]
    named = [each for each in inside if each.name in quote] or inside
    if not named or is_marked(state):
        return None
    cache = named[0]
    target = cache.with_name(f"{cache.name}{_BAD}{ident}")
    write_atomic(state / MARKER, json.dumps({"moved": str(cache), "to": str(target), "incident": ident}) + "\n")
    try:
        cache.rename(target)
    except OSError:
        with contextlib.suppress(OSError):
            forget(state)  # it was not tried
        raise
    return cache, target


def _remove_older(cache: Path, target: Path) -> None:
    """One is enough for a look. They hold gigabytes, so nobody waits for it: what the exit cuts short, the next time removes."""
    for each in cache.parent.glob(f"{cache.name}{_BAD}*"):
        if each != target:
            shutil.rmtree(each, ignore_errors=True)
