"""`vllmctl engine remove`: an engine that nobody runs, has chosen or is pinned to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from vllmd.engines import choice, record
from vllmd.engines.install import REMOVING, only_one, sweep
from vllmd.errors import TryLater, UsageError
from vllmd.system.sharedlock import claim

Say = Callable[[str], None]


def remove(engines: Path, name: str, pinned_by: list[str], users: list[str], say: Say) -> None:
    """Removes it whole, or not at all. `pinned_by` and `users` are the instances that ask for it, and that run it, as far as
    is known; whoever runs it also holds a lock on its directory. UsageError, TryLater, StorageFailed."""
    choice.require(engines, name)
    with choice.explained(f"remove {name}"), only_one(engines):
        sweep(engines, say)
        _refuse(engines, name, pinned_by, users)
        release = claim(engines / name)
        if release is None:
            raise _in_use(name, users)
        try:
            if choice.previous_name(engines) == name:
                (engines / record.PREVIOUS).unlink(missing_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=REMOVING, dir=engines))
            (engines / name).rename(aside / name)
            choice.sync_directory(engines)
        finally:
            release()
        shutil.rmtree(aside)
    say(f"{name} is removed")


def _refuse(engines: Path, name: str, pinned_by: list[str], users: list[str]) -> None:
    if choice.current_name(engines) == name:
        raise UsageError("engine_chosen", f"{name} is the chosen engine", "`vllmctl engine use` another one first")
    if pinned_by:
        raise UsageError("engine_pinned", f"{name} is the engine of {', '.join(pinned_by)}, by its configuration", "change engine.version (or engine.executable) there first")
    if users:
        raise _in_use(name, users)


def _in_use(name: str, users: list[str]) -> TryLater:
    who = f"instance{'s' if len(users) > 1 else ''} {', '.join(users)}" if users else "an instance"
    return TryLater("engine_in_use", f"{name} is being run by {who}", "stop or restart what runs it (`vllmctl status`), then remove it")
