"""config, the first stage: the layers of an instance become one frozen Config, and every value knows where it came from.

    built-in < vllmd.yaml < NAME.yaml < NAME.d/*.yaml in order of name < environment < command line

A later layer wins, value by value; engine.args and engine.env are merged name by name (null takes a name away). A
layer that names another model takes back what lower layers said of the old one. Nothing is written, run or resolved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllmd.config import sources, yamlfile
from vllmd.config.given import BUILT_IN, Given, Origin, merged
from vllmd.config.paths import Paths
from vllmd.config.rows import SECTIONS, Row, table
from vllmd.config.settings import Config
from vllmd.config.yamlfile import Document
from vllmd.errors import ConfigError, PermissionMissing, UsageError

HOST_FILE = "vllmd.yaml"
RESERVED_NAMES = frozenset({"vllmd", "presets"})

_INSTANCE = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}", re.ASCII)

_TAKES_BACK = {
    "model.path": ("model.id", "model.name", "model.org", "model.revision"),
    "model.id": ("model.path", "model.revision"),
    "model.name": ("model.id", "model.path", "model.revision"),
    "model.org": ("model.id", "model.path", "model.revision"),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """The parsed configuration. `origins` has every key, and `engine.args.NAME`, `engine.env.NAME`; `files` those read,
    `sums` the SHA-256 of each."""

    config: Config
    origins: Mapping[str, Origin]
    warnings: tuple[str, ...]
    files: tuple[Path, ...] = ()
    sums: Mapping[Path, str] = field(default_factory=dict)


def check_instance_name(name: str) -> str:
    """The name itself. UsageError (bad_instance_name) where it can be no instance."""
    if not _INSTANCE.fullmatch(name):
        hint = "use lower-case letters, digits, '.', '_' and '-', at most 48, beginning with a letter or digit"
        raise UsageError("bad_instance_name", f"{name!r:.80} cannot be the name of an instance", hint)
    if name in RESERVED_NAMES or name.endswith(".d"):
        raise UsageError("bad_instance_name", f"the name {name!r} is reserved", "choose another name for the instance")
    return name


def instance_names(paths: Paths) -> list[str]:
    """The instances that have a file, in order of name. PermissionMissing where this user may not look."""
    found = [path.stem for path in _listed(paths.config) if path.suffix == ".yaml"]
    return sorted(name for name in found if _INSTANCE.fullmatch(name) and name not in RESERVED_NAMES and not name.endswith(".d"))


def _listed(directory: Path) -> list[Path]:
    """What is in a directory of configuration; nothing where there is none."""
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except PermissionError as error:
        raise PermissionMissing("config_unreadable", f"{directory}: {error.strerror}", f"let the service read it: chgrp vllmd {directory}") from None
    except OSError as error:
        raise ConfigError("config_unreadable", f"{directory}: {error.strerror}", "put a directory of YAML files there, or remove it") from None


def drop_ins(paths: Paths, instance: str) -> list[Path]:
    """NAME.d/*.yaml, in their order."""
    found = _listed(paths.config / f"{instance}.d")
    return [path for path in found if path.suffix == ".yaml" and not path.name.startswith(".")]


def _overlooked(paths: Paths, instance: str) -> list[str]:
    """Warnings on files that were meant to be read."""
    found = [path for path in _listed(paths.config / f"{instance}.d") if path.suffix == ".yml"]
    return [f"{path}: not read, a drop-in's name ends in .yaml" for path in found]


def _absent(paths: Paths, instance: str) -> ConfigError:
    import difflib  # needed for errors only

    path = paths.instance_config(instance)
    if path.with_suffix(".yml").exists():
        return ConfigError("no_instance", f"{path} does not exist", f"mv {path.with_suffix('.yml')} {path}")
    near = difflib.get_close_matches(instance, instance_names(paths), n=1)
    meant = f"did you mean the instance {near[0]}? else " if near else ""
    return ConfigError("no_instance", f"{path} does not exist", f"{meant}create it, e.g. with the line: model: Qwen/Qwen3-0.6B")


def read_documents(paths: Paths, instance: str | None, *, require_file: bool) -> list[Document]:
    """The files of the layers, lowest first. ConfigError (no_instance) where the instance must have a file and has none."""
    files = [paths.config / HOST_FILE]
    if instance is not None:
        check_instance_name(instance)
        files += [paths.instance_config(instance), *drop_ins(paths, instance)]
    documents = []
    for path in files:
        try:
            documents.append(yamlfile.load(path))
        except FileNotFoundError:
            if path.is_symlink():
                raise ConfigError("config_unreadable", f"{path} is a link that leads nowhere", "correct the link, or remove it") from None
            if require_file and instance is not None and path == paths.instance_config(instance):
                raise _absent(paths, instance) from None
    return documents


@dataclass(frozen=True, slots=True)
class _Layers:
    """The layers before they are parsed."""

    documents: list[Document]
    environ: Mapping[str, str]
    overrides: Mapping[str, object]

    def given(self, rows: Mapping[str, Row], *, partial: bool = False) -> list[list[Given]]:
        return [
            *(sources.from_file(document, rows, partial=partial) for document in self.documents),
            sources.from_environment(self.environ, rows),
            sources.from_command_line(self.overrides, rows, partial=partial),
        ]

    def tuning(self, tuning_for: Callable[[str], type[Any]]) -> type[Any]:
        """The rows of the engine that the layers name, as `tuning_for` gives them; its ConfigError with the place."""
        row = table(None)["engine.name"]
        found = [given for layer in self.given({row.key: row}, partial=True) for given in layer]
        if not found:
            return tuning_for(str(row.default))
        try:
            return tuning_for(found[-1].value)
        except ConfigError as error:
            raise ConfigError(error.code, f"{found[-1].origin}: {error.what}", error.hint) from error


def _names_of_id(layer: dict[str, Given], rows: Mapping[str, Row]) -> dict[str, Given]:
    """An id says name and organisation too, unless its layer gives them."""
    given = layer.get("model.id")
    if given is None or not given.value:
        return layer
    org, _, name = given.value.rpartition("/")
    derived = {"model.name": name, "model.org": org}
    return {**{key: replace(given, row=rows[key], value=value) for key, value in derived.items()}, **layer}


def _complete_id(state: dict[str, Given], rows: Mapping[str, Row]) -> None:
    name, org, whole = (state.get(f"model.{part}") for part in ("name", "org", "id"))
    if name and name.value and org and org.value and not (whole and whole.value):
        state["model.id"] = replace(name, row=rows["model.id"], value=f"{org.value}/{name.value}")


def _stack(layers: Iterable[list[Given]], rows: Mapping[str, Row]) -> dict[str, Given]:
    state: dict[str, Given] = {}
    for given in layers:
        layer = _names_of_id({item.row.key: item for item in given}, rows)
        for key, others in _TAKES_BACK.items():
            new = layer[key].value if key in layer else ""
            if new and (key not in state or state[key].value != new):
                for other in others:
                    state.pop(other, None)
        for key, item in layer.items():
            below = state.get(key)
            state[key] = merged(below, item) if below is not None and item.row.merges else item
        _complete_id(state, rows)
    return state


def _config(state: Mapping[str, Given], rows: Mapping[str, Row], tuning: type[Any]) -> Config:
    values: dict[str, dict[str, Any]] = {}
    for row in rows.values():
        value = state[row.key].value if row.key in state else row.default
        values.setdefault(row.attribute, {})[row.name] = value
    parts = {name: kind(**values.get(name, {})) for name, kind in SECTIONS.items()}
    return Config(**parts, tuning=tuning(**values.get("tuning", {})), **values.get("", {}))


def _origins(state: Mapping[str, Given], rows: Mapping[str, Row]) -> dict[str, Origin]:
    origins = {key: state[key].origin if key in state else BUILT_IN for key in rows}
    for key, given in state.items():
        if given.row.merges:
            origins |= {f"{key}.{name}": given.items.get(name, given.origin) for name in given.value}
    return origins


def _modes(documents: list[Document], state: Mapping[str, Given]) -> list[str]:
    """Warnings on files that the wrong people may read or write."""
    modes = {document.where: document.mode for document in documents}
    found = [f"{where}: every user of this host may write it: chmod o-w {where}" for where, mode in modes.items() if mode & 0o002]
    for key, given in state.items():
        if given.row.setting.secret and given.value and modes.get(given.origin.place, 0) & 0o004:
            found.append(f"{given.origin}: {key}: every user of this host may read this secret: chmod 0640 {given.origin.place}")
    return found


def load(
    paths: Paths,
    instance: str | None,
    environ: Mapping[str, str],
    overrides: Mapping[str, object],
    tuning_for: Callable[[str], type[Any]],
    *,
    require_file: bool = True,
    read_files: bool = True,
) -> Loaded:
    """Read, parse and check every layer. `overrides` are the command line's, by key (`serve.port`, or `model`).

    `tuning_for` gives the dataclass of an engine's own rows by its name (ConfigError where there is no such engine).
    `require_file=False` lets an instance have no file of its own; `read_files=False` reads none at all (the commands that
    are configured by environment alone). ConfigError, or UsageError for the command line, with place, key and reason.
    """
    documents = read_documents(paths, instance, require_file=require_file) if read_files else []
    layers = _Layers(documents, environ, overrides)
    tuning = layers.tuning(tuning_for)
    rows = table(tuning)
    given = layers.given(rows)
    state = _stack(given, rows)
    warnings = [warning for layer in given for item in layer for warning in item.warnings]
    warnings += [*sources.misspelt(environ, rows), *_modes(documents, state)]
    warnings += _overlooked(paths, instance) if read_files and instance else []
    return Loaded(
        config=_config(state, rows, tuning),
        origins=MappingProxyType(_origins(state, rows)),
        warnings=tuple(dict.fromkeys(warnings)),
        files=tuple(Path(document.where) for document in documents),
        sums=MappingProxyType({Path(document.where): document.sha256 for document in documents}),
    )
