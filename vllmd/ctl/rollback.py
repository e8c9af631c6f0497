"""`vllmctl rollback NAME [GENERATION]`: the files of a generation come back, its model's version and its engine are pinned,
and the instance restarts.

Root does this, and the record of a generation is written by the service's account. So the record decides nothing but which
of the sets of files that root itself put aside comes back (by its sum), which published version of the model, and which
of the engines that root installed; each is looked up and never taken from its text.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vllmd import configured
from vllmd.config import layers, show
from vllmd.config.layers import HOST_FILE
from vllmd.config.paths import Paths
from vllmd.config.redact import redactor
from vllmd.config.settings import EngineChoice
from vllmd.config.values import printable
from vllmd.ctl import rollback_mark
from vllmd.ctl import unit as units
from vllmd.ctl.files import text
from vllmd.ctl.generations import Generation, check_owner, look
from vllmd.engines import choice, registry
from vllmd.errors import ConfigError, ModelNotFound, PermissionMissing, UsageError, VllmdError
from vllmd.instance import generations
from vllmd.instance.generations import BEFORE, Kept
from vllmd.models import kept as kept_versions
from vllmd.models.identity import label
from vllmd.models.store import PUBLISHED, published_target
from vllmd.system.files import directory_like, storage_error, write_atomic
from vllmd.system.owner import as_owner

DROP_IN = "zz-rollback.yaml"
"""Comes last among the drop-ins: what it pins holds."""
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,200}")


@dataclass(frozen=True, slots=True)
class Options:
    asks: bool = True
    restarts: bool = True
    host_file: bool = False


@dataclass(frozen=True, slots=True)
class Way:
    """What a rollback does: `files` as they will be, `now` as they are; `told` what a person should know."""

    instance: str
    title: str
    files: Mapping[str, Kept]
    now: Mapping[str, Kept]
    told: tuple[str, ...] = ()
    version: Path | None = None
    """Of the model, in its store, where it is pinned."""

    @property
    def changed(self) -> list[str]:
        return [name for name in sorted({*self.files, *self.now}) if self.files.get(name) != self.now.get(name)]


def rollback(paths: Paths, name: str, wanted: str | None, options: Options) -> int:
    """0 when READY again. Raises VllmdError: before anything was changed, or, after a restart that failed, with the way back."""
    instance = units.instance_name(name)
    check_owner(paths)
    try:
        way = _before(paths, instance, options) if wanted == BEFORE else _back(paths, instance, _chosen(paths, instance, wanted), options)
    except OSError as error:
        raise storage_error(error, "read the kept configuration") from error
    for line in (*_diff(paths, way), *way.told):
        sys.stdout.write(f"{line}\n")
    if not way.changed:
        sys.stdout.write(f"{way.title}: nothing has to be changed\n")
        return 0
    if options.asks and not _confirmed(way):
        sys.stdout.write("nothing was changed\n")
        return 0
    try:
        _apply(paths, way)
    except PermissionError as error:
        raise PermissionMissing("permission_missing", f"cannot write {paths.config}: {error.strerror}", f"sudo vllmctl rollback {instance}") from None
    except OSError as error:
        raise storage_error(error, f"write {paths.config}") from error
    _hold(way)
    sys.stdout.write(f"{instance} is configured as {way.title}; `vllmctl rollback {instance} {BEFORE}` undoes that\n")
    return _restart(paths, way) if options.restarts else 0


def _hold(way: Way) -> None:
    """The pinned version is one that retention could take before the instance is READY with it, and another instance fetches a newer one."""
    if way.version is None:
        return
    store = way.version.parent.parent.parent
    try:
        with as_owner(store):
            kept_versions.add(store, way.instance, way.version.name)
    except (OSError, VllmdError) as error:
        sys.stdout.write(f"{printable(str(way.version))} may be removed before the instance has it: {error}\n")


def _restart(paths: Paths, way: Way) -> int:
    from vllmd.ctl import follow

    if paths.scope == "root":
        sys.stdout.write("it is run by hand: restart it to let this take effect\n")
        return 0
    try:
        return follow.bring_up(paths, "restart", way.instance, wait=True, timeout_s=None)
    except VllmdError as error:
        error.what = f"the rollback did not help: {error.what}"
        error.hint = f"{error.hint}; to undo the rollback: vllmctl rollback {way.instance} {BEFORE}"
        raise


# --- what comes back


def _chosen(paths: Paths, instance: str, wanted: str | None) -> Generation:
    found = look(paths, instance)
    hint = f"`vllmctl generations {instance}` lists them"
    if wanted is not None:
        chosen = [each for each in found if wanted.isascii() and wanted.isdigit() and each.number == int(wanted)]
        if not chosen:
            raise UsageError("no_generation", f"instance {instance} has no generation {printable(wanted)[:40]!r}", hint)
        return chosen[0]
    # The newest is what runs, or ran last: unless its files were changed since, the one before it is meant.
    others = [each for each in found if not each.is_current] if found and not found[0].is_current else found[1:]
    if not others:
        raise UsageError("no_generation", f"instance {instance} has no generation to go back to", hint)
    return others[0]


def _back(paths: Paths, instance: str, chosen: Generation, options: Options) -> Way:
    kept = generations.kept_files(paths, instance, chosen.configuration) if chosen.configuration else {}
    if not kept:
        what = f"the files of generation {chosen.number} were not kept, or are not what they were"
        raise ConfigError("not_kept", what, f"choose another one: vllmctl generations {instance}")
    pins, told = _pins(paths, instance, chosen)
    if pins:
        pins = {**_own_pins(kept.get(f"{instance}.d/{DROP_IN}")), **pins}
        content = f"# Made by `vllmctl rollback {instance} {chosen.number}`. Remove it to follow the newest again.\n{json.dumps(pins, indent=1, default=str)}\n".encode()
        owner = kept.get(f"{instance}.yaml") or next(iter(kept.values()))
        kept = {**kept, f"{instance}.d/{DROP_IN}": replace(owner, content=content)}
    way = _way(paths, instance, f"generation {chosen.number}", kept, told, options)
    return replace(way, version=_pinned_version(kept.get(f"{instance}.d/{DROP_IN}")))


def _own_pins(drop_in: Kept | None) -> dict[str, Any]:
    """What an earlier rollback had pinned when this generation was READY: its model stays pinned although only its engine must be, now."""
    try:
        found = yaml.safe_load(drop_in.content) if drop_in is not None else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _pinned_version(drop_in: Kept | None) -> Path | None:
    """In its store; None for a directory of somebody's own."""
    model = _own_pins(drop_in).get("model")
    path = Path(model) if isinstance(model, str) else Path()
    return path if path.parent.parent.name == PUBLISHED and generations.SUM.fullmatch(path.name) else None


def _before(paths: Paths, instance: str, options: Options) -> Way:
    kept = generations.kept_files(paths, instance, BEFORE)
    if not kept:
        raise UsageError("no_generation", f"nothing was rolled back yet for instance {instance}", f"`vllmctl generations {instance}` lists what there is")
    return _way(paths, instance, "before the last rollback", kept, (), options)


def _way(paths: Paths, instance: str, title: str, kept: Mapping[str, Kept], told: tuple[str, ...], options: Options) -> Way:
    now = generations.present_files(paths, instance)
    files = dict(kept)
    if not options.host_file and files.get(HOST_FILE) != now.get(HOST_FILE):
        told = (*told, f"{paths.config / HOST_FILE} was another one then; it is shared by all instances and stays (--host-file puts it back too)")
        files.pop(HOST_FILE, None)
        files.update({HOST_FILE: now[HOST_FILE]} if HOST_FILE in now else {})
    return Way(instance, title, files, now, told)


def _pins(paths: Paths, instance: str, chosen: Generation) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the files alone would not bring back: the model's version, the engine."""
    there = replace(paths, config=paths.config / generations.FILES_FOLDER / instance / chosen.configuration)
    prepared = configured.prepare(instance, there, {})
    pins: dict[str, Any] = {}
    told: list[str] = []
    request = configured.model_request(prepared.config, paths)
    version = text(chosen.record, "model", "version")
    if request.selected and not request.path and generations.SUM.fullmatch(version):
        link = request.store / label(request)
        current = published_target(request.store, link)
        if current is None or current.name != version:
            directory = _version(request.store, label(request), version, chosen)
            pins["model"] = str(directory)
            pins["serve"] = {"served_model_name": prepared.config.serve.served_model_name or request.name}
            told.append(f"the model is pinned to version {version[:12]}, {directory}")
    engine = _engine(paths, prepared.config.engine, chosen)
    if engine:
        pins["engine"] = {"version": engine}
        told.append(f"the engine is pinned to {engine}")
    return pins, tuple(told)


def _version(store: Path, own_label: str, version: str, chosen: Generation) -> Path:
    """Under this model's own label, else under that which the record has (a revision of its own)."""
    recorded = Path(text(chosen.record, "model", "directory")).parent.name
    for each in (own_label, recorded):
        directory = store / PUBLISHED / each / version
        if _LABEL.fullmatch(each) and each.strip(".") and directory.is_dir() and not directory.is_symlink():
            return directory
    what = f"version {version[:12]} of the model of generation {chosen.number} is not in {store} any more"
    raise ModelNotFound("version_gone", what, "choose another generation, or import that version: vllmctl store import")


def _engine(paths: Paths, configured: EngineChoice, chosen: Generation) -> str:
    """The engine to pin, as `engine.version` has it; '' where the files decide, or where it is the one in use anyway."""
    wanted = text(chosen.record, "engine", "directory")
    if configured.executable or not wanted:
        return ""
    if wanted not in dict(choice.installed_engines(paths.engines)):
        what = f"the engine of generation {chosen.number}, {printable(wanted)[:60]}, is not installed any more"
        raise ConfigError("engine_gone", what, "install that version again: vllmctl engine install --no-use --version ...")
    now = choice.pinned(paths.engines, configured.version) if configured.version else choice.current_name(paths.engines)
    return "" if wanted == now else wanted


# --- what is shown, and done


def _diff(paths: Paths, way: Way) -> Iterator[str]:
    """Secrets of both sides are redacted."""
    redact = redactor(tuple(sorted(_secrets(paths, way.instance))))
    for name in way.changed:
        old, new = (each[name].content.decode(errors="replace").splitlines() if name in each else [] for each in (way.now, way.files))
        for line in difflib.unified_diff(old, new, str(paths.config / name), way.title, lineterm=""):
            yield printable(redact(line))


def _secrets(paths: Paths, instance: str) -> set[str]:
    found: set[str] = set()
    folder = paths.config / generations.FILES_FOLDER / instance
    for config in (paths.config, *(path for path in folder.iterdir() if path.is_dir())):
        try:
            found |= set(show.secrets(layers.load(replace(paths, config=config), instance, {}, {}, lambda name: registry.get(name).tuning).config))
        except VllmdError:  # what is broken now is what one goes back from; known places of secrets are redacted all the same
            continue
    return found


def _confirmed(way: Way) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("not_confirmed", "nobody can be asked, as standard input is no terminal", "--yes does it without a question")
    sys.stderr.write(f"Configure {way.instance} as {way.title}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _apply(paths: Paths, way: Way) -> None:
    """What is replaced is put aside first, as `before`; half of a rollback that was cut short is not worth that. OSError."""
    if not rollback_mark.is_half_way(paths, way.instance):
        generations.keep_files(paths, way.instance, keep=100, name=BEFORE)
    rollback_mark.begun(paths, way.instance, way.files)
    for name in way.changed:
        path = paths.config / name
        if name not in way.files:
            path.unlink(missing_ok=True)
            continue
        each = way.files[name]
        directory_like(path.parent, paths.config)
        write_atomic(path, each.content, mode=each.mode)
        if os.geteuid() == 0:
            os.chown(path, each.uid, each.gid, follow_symlinks=False)
    rollback_mark.done(paths, way.instance)
