"""`vllmctl engine list`: the installed engines, and what the instances of this host have to do with them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.config import layers
from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.ctl import engine_fit as fit
from vllmd.ctl import files
from vllmd.engines import choice, record, registry
from vllmd.errors import VllmdError

_RUNNING = frozenset({"starting", "proven", "ready", "draining", "examining", "killing"})


@dataclass(frozen=True, slots=True)
class User:
    """An instance that runs an engine now: the engine's directory name ('' for one from elsewhere), and by what it was chosen."""

    instance: str
    engine: str
    chosen: str


def users(paths: Paths) -> list[User]:
    """As their supervisors say."""
    found = []
    for name in files.names(paths):
        said = files.status(paths, name)
        program = files.text(said, "engine", "executable")
        if program and files.text(said, "state") in _RUNNING and _lives(said):
            found.append(User(name, engine_of(paths.engines, program), files.text(said, "engine", "chosen")))
    return found


def _lives(said: dict[str, Any]) -> bool:
    """A supervisor that was killed leaves its last words behind."""
    pid = files.number(said, "engine", "pid")
    return pid is None or Path(f"/proc/{pid:.0f}").exists()


def engine_of(engines: Path, program: str) -> str:
    """The name of the directory below `engines` in which the program lies; '' where it lies elsewhere."""
    try:
        return Path(program).relative_to(os.path.realpath(engines)).parts[0]
    except (ValueError, IndexError):
        return ""


def pins(paths: Paths) -> tuple[dict[str, str], list[str]]:
    """Engine by instance, of those whose configuration names one; and why some configurations cannot be read."""
    found, unread = {}, []
    for name in layers.instance_names(paths):
        try:
            engine = layers.load(paths, name, {}, {}, lambda each: registry.get(each).tuning).config.engine
            if engine.version:
                found[name] = choice.pinned(paths.engines, engine.version)
            elif engine.executable:
                found[name] = engine_of(paths.engines, os.path.realpath(engine.executable))
        except VllmdError as error:
            if error.code != "engine_missing":  # pinned to what is not there: to none of those that are
                unread.append(f"{name}: {error.what}")
    return found, unread


def show(paths: Paths, *, as_json: bool) -> int:
    found = [_row(paths, name, known) for name, known in choice.installed_engines(paths.engines)]
    running, (pinned, unread) = users(paths), pins(paths)
    for each in found:
        each["running"] = sorted(user.instance for user in running if user.engine == each["name"])
        each["pinned"] = sorted(instance for instance, engine in pinned.items() if engine == each["name"])
    if as_json:
        sys.stdout.write(json.dumps({"schema": 1, "engines": found}) + "\n")
        return 0
    for engine in found:
        sys.stdout.write("\n".join(printable(line) for line in _lines(engine)) + "\n")
    for why in unread:
        sys.stderr.write(printable(f"not known whether pinned: {why}") + "\n")
    if not found:
        sys.stderr.write(f"no engine in {paths.engines}; `vllmctl engine install` installs one\n")
    return 0


def _row(paths: Paths, name: str, known: record.Record) -> dict[str, Any]:
    return {
        "name": name,
        "current": name == choice.current_name(paths.engines),
        "previous": name == choice.previous_name(paths.engines),
        "version": known.version,
        "variant": known.variant,
        "torch": known.torch,
        "cuda": known.cuda,
        "rocm": known.rocm,
        "archs": list(known.archs),
        "python": known.python,
        "py_spy": known.py_spy,
        "locked": bool(known.lock),
        "installed_at": known.installed_at,
        "unfit": [each.what for each in fit.of(known)],
    }


def _lines(engine: dict[str, Any]) -> Iterator[str]:
    built = f"CUDA {engine['cuda']}" if engine["cuda"] else f"ROCm {engine['rocm']}" if engine["rocm"] else "CPU"
    facts = [f"torch {engine['torch']}", built, *([f"Python {engine['python']}"] if engine["python"] else []), *(["locked"] if engine["locked"] else [])]
    mark = "*" if engine["current"] else "-" if engine["previous"] else " "
    yield f"{mark} {engine['name']:<28} {', '.join(facts)}"
    for label, names in (("run by", engine["running"]), ("pinned by", engine["pinned"])):
        if names:
            yield f"    {label} {', '.join(names)}"
    yield from (f"    does not fit this host: {each}" for each in engine["unfit"])
