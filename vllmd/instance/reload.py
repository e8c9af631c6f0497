"""SIGHUP: read the configuration again, and say which changes apply now and which need a restart. Pure comparison."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from vllmd.config.settings import Config


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
    return replace(old, watch=new.watch, log=new.log)
