"""`vllmctl forget NAME`: what is left of an instance whose configuration is gone: keys, incidents, generations, and its word for models.

Nothing of this goes by itself. A configuration may be away for an hour, and a store may be shared with a host that has the instance.
What lies below the state is removed with the rights of its owner: links that the service's account put there lead nowhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllmd.config import layers
from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.ctl import unit as units
from vllmd.ctl.store import place_of
from vllmd.engines import registry
from vllmd.errors import TryLater, UsageError, VllmdError
from vllmd.instance import keys
from vllmd.instance.generations import FILES_FOLDER
from vllmd.models import kept
from vllmd.system.files import storage_error
from vllmd.system.lockfile import is_locked
from vllmd.system.owner import as_owner

_CREDSTORES = (Path("/etc/credstore"), Path("/etc/credstore.encrypted"))


@dataclass(frozen=True, slots=True)
class Left:
    """`path` lies below `root`, with whose owner's rights it is removed."""

    root: Path
    path: Path
    what: str


def forget(paths: Paths, name: str, *, asks: bool) -> int:
    """0 when nothing is left, or when a person said no. UsageError, TryLater, StorageFailed, PermissionMissing."""
    instance = units.instance_name(name)
    _refuse(paths, instance)
    found = list(_left(paths, instance))
    for each in found:
        sys.stdout.write(f"{printable(str(each.path))}: {each.what}\n")
    if not found:
        sys.stdout.write(f"nothing is left of {instance}\n")
    elif asks and not _confirmed(instance):
        sys.stdout.write("nothing was removed\n")
        return 0
    for each in found:
        _remove(each)
    if found:
        sys.stdout.write(f"{instance} is forgotten; `{paths.vllmctl} store gc` removes versions of models that nobody needs now\n")
    for line in _yours(paths, instance):
        sys.stdout.write(f"{line}\n")
    return 0


def _refuse(paths: Paths, instance: str) -> None:
    for path in (paths.instance_config(instance), paths.config / f"{instance}.d"):
        if os.path.lexists(path):
            raise UsageError("still_configured", f"{instance} has a configuration: {path}", f"stop it and remove that first: systemctl{' --user' if paths.scope == 'user' else ''} disable --now {units.unit(instance)}; rm -r {path}")
    if is_locked(paths.instance_runtime(instance) / "lock"):
        raise TryLater("instance_runs", f"{instance} runs, although it has no configuration", f"{paths.vllmctl} stop {instance}")


def _left(paths: Paths, instance: str) -> Iterator[Left]:
    state, public = paths.instance_state(instance), paths.state / "public"
    found = [Left(store, store / kept.DIRECTORY / instance, "keeps versions of models for a rollback") for store in _stores(paths, instance)]
    link = public / keys.CREDENTIALS
    with contextlib.suppress(OSError):
        if os.readlink(link) == f"{instance}/{keys.CREDENTIALS}":  # noqa: PTH115 - the text of the link is wanted
            found.append(Left(paths.state, link, "leads to its key; the next start of another instance makes it anew"))
    found += [
        Left(paths.state, public / instance, "its key, for programs of this host"),
        Left(paths.state, state, "its API keys, incidents, generations and last words"),
        Left(paths.config, paths.config / FILES_FOLDER / instance, "the files of its generations"),
    ]
    yield from (each for each in found if _is_there(each.path))


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise storage_error(error, f"look at {path}") from error
    return True


def _stores(paths: Paths, instance: str) -> list[Path]:
    """The host's, and what the files that root kept of it name: a record of the service's could name anything."""
    found = [place_of(paths, None, os.environ).store]
    folder = paths.config / FILES_FOLDER / instance
    with contextlib.suppress(OSError):
        for each in sorted(folder.iterdir()):
            with contextlib.suppress(VllmdError):
                named = layers.load(replace(paths, config=each), instance, {}, {}, _tuning).config.model.dir
                found += [Path(named)] if named else []
    return list(dict.fromkeys(found))


def _tuning(name: str) -> type[Any]:
    return registry.get(name).tuning


def _confirmed(instance: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("not_confirmed", "nobody can be asked, as standard input is no terminal", "--yes removes without a question")
    sys.stderr.write(f"Remove all of it, and forget {instance}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _remove(each: Left) -> None:
    try:
        with as_owner(each.root):
            if each.path.is_dir() and not each.path.is_symlink():
                shutil.rmtree(each.path)
            else:
                each.path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, f"remove {error.filename or each.path}") from error


def _yours(paths: Paths, instance: str) -> Iterator[str]:
    """What a person made, and removes."""
    if paths.scope != "system":
        return
    for path in (folder / f"vllmd.{instance}.api-key" for folder in _CREDSTORES):
        if path.exists():
            yield f"{path} stays: a credential of yours"
    if any(Path("/etc/systemd/system").glob(f"*.wants/{units.unit(instance)}")):
        yield f"{units.unit(instance)} is enabled still: systemctl disable {units.unit(instance)}"
