"""SIGHUP: read the configuration again, and say which changes apply now and which need a restart."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from vllmd import configured, stages
from vllmd.config.settings import Config
from vllmd.configured import Prepared
from vllmd.errors import VllmdError
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys whose value differs. `live` apply at once; `restart` only with a new engine."""

    live: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        return bool(self.live or self.restart)


def _changed(old: Any, new: Any, prefix: str) -> list[tuple[str, bool]]:
    """(key, needs a restart) of each row that differs."""
    found: list[tuple[str, bool]] = []
    for item in fields(old):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if before == after:
            continue
        row = item.metadata.get("setting")
        name = f"{prefix}{item.name}"
        if row is not None:
            found.append((name, row.restart))
        elif is_dataclass(before) and type(before) is type(after):
            section = "serve" if item.name == "tuning" else item.name
            found += _changed(before, after, f"{prefix}{section}.")
        else:
            found.append((name, True))
    return found


def compare(old: Config, new: Config) -> Changes:
    changed = _changed(old, new, "")
    return Changes(
        live=tuple(sorted(name for name, restart in changed if not restart)),
        restart=tuple(sorted(name for name, restart in changed if restart)),
    )


def apply_live(old: Config, new: Config) -> Config:
    """The old configuration with the sections that a running instance can take over."""
    serve = replace(old.serve, open_paths=new.serve.open_paths)
    return replace(old, watch=new.watch, log=new.log, metrics=new.metrics, serve=serve)


def _has_other_engine(fresh: Prepared, running: str) -> bool:
    """Whether a start of now would run another program: another engine was chosen since."""
    try:
        return bool(running) and stages.context(fresh).installed.executable != running
    except VllmdError:
        return True


def read_again(prepared: Prepared, old: Config, journal: Journal | Stderr, running: str = "") -> tuple[Config, tuple[str, ...]] | None:
    """The configuration that holds now, and the keys that wait for a restart; None when it is wrong, and not taken over.
    `running` is the program that serves ('' for none): an engine that was chosen since is told as `engine`."""
    instance = prepared.instance
    try:
        read = configured.prepare(instance, prepared.paths, prepared.environ, prepared.overrides)
    except VllmdError as error:
        journal.event("reloaded", f"the configuration is not taken over: {error.what}", priority=3, hint=error.hint)
        return None
    fresh = read.config
    changes = compare(old, fresh)
    if not any(key.startswith("engine.") for key in changes.restart) and _has_other_engine(read, running):
        changes = replace(changes, restart=(*changes.restart, "engine"))
    told = f"applied: {', '.join(changes.live)}" if changes.live else "nothing changed that applies now"
    journal.event("reloaded", f"configuration read again; {told}", priority=5)
    if changes.restart:
        what, hint = f"needs a restart: {', '.join(changes.restart)}", f"systemctl restart vllmd@{instance}"
        journal.event("reload-needs-restart", what, priority=4, hint=hint)
    return apply_live(old, fresh), changes.restart
