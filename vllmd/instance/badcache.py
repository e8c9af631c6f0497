"""A cache of compiled code that breaks every start: moved aside once, so that the next start compiles anew.

Once: a second time it cannot have been the cache. The marker goes when the instance has become ready.
"""

from __future__ import annotations

import json
import shutil
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
    return await in_thread(lambda: _move(state, root, caches, quote, ident))


def _move(state: Path, root: Path, caches: Sequence[Path], quote: str, ident: str) -> tuple[Path, Path] | None:
    inside = [each for each in caches if each.is_dir() and not each.is_symlink() and root in each.parents]
    named = [each for each in inside if each.name in quote] or inside
    if not named or is_marked(state):
        return None
    cache = named[0]
    target = cache.with_name(f"{cache.name}{_BAD}{ident}")
    older = list(cache.parent.glob(f"{cache.name}{_BAD}*"))
    write_atomic(state / MARKER, json.dumps({"moved": str(cache), "to": str(target), "incident": ident}) + "\n")
    cache.rename(target)
    for each in older:  # one is enough for a look; they hold gigabytes
        shutil.rmtree(each, ignore_errors=True)
    return cache, target
