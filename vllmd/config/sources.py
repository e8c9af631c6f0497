"""What each kind of layer gives: a YAML file, the environment, the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllmd.config.given import Given, Origin, give
from vllmd.config.rows import SECTIONS, Row, closest
from vllmd.config.yamlfile import Document
from vllmd.errors import ConfigError, UsageError

Table = Mapping[str, Row]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value in a file: its key, its path in the document, and what stands there."""

    key: str
    path: tuple[str, ...]
    value: Any


def model_words(value: object) -> dict[str, object]:
    """The rows that a plain `model: X` sets: a directory, or a hub id; '' takes back what a lower layer chose."""
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return {"model.path": value}
    if value == "":
        return {"model.id": "", "model.name": "", "model.org": "", "model.path": ""}
    return {"model.id": value}


def _entries(document: Document) -> Iterator[_Entry]:
    for section, value in document.values.items():
        if value is None:
            continue
        if isinstance(value, dict) and section in SECTIONS:
            yield from (_Entry(f"{section}.{key}", (section, key), item) for key, item in value.items() if item is not None)
        elif section == "model":
            yield from (_Entry(key, (section,), item) for key, item in model_words(value).items())
        elif section in SECTIONS:
            what = f"{document.where}:{document.line(section)}: {section}: must hold settings, one on each line below it"
            raise ConfigError("bad_section", what, f"write '{section}:', and below it, indented, 'KEY: VALUE'")
        else:
            yield _Entry(section, (section,), value)


def _unknown(document: Document, entry: _Entry, table: Table) -> ConfigError:
    what = f"{document.where}:{document.line(*entry.path)}: {entry.key}: unknown key"
    meant = closest(entry.key, [*table, *SECTIONS])
    if meant:
        return ConfigError("unknown_key", what, f"did you mean {meant}?")
    if entry.path[0] in ("serve", "engine"):
        return ConfigError("unknown_key", what, "a flag of the engine itself goes under engine.args; vllmd.yaml(5) lists the settings")
    return ConfigError("unknown_key", what, "vllmd.yaml(5) lists the settings")


def from_file(document: Document, table: Table, *, partial: bool = False) -> list[Given]:
    """What a file gives. ConfigError on an unknown key; `partial` skips those (the table is not complete yet)."""
    found = []
    for entry in _entries(document):
        row = table.get(entry.key)
        if row is None and partial:
            continue
        if row is None:
            raise _unknown(document, entry, table)
        origin = Origin("file", document.where, document.line(*entry.path))
        names = entry.value if isinstance(entry.value, dict) else {}
        items = {name: Origin("file", document.where, document.line(*entry.path, name)) for name in names}
        found.append(give(row, entry.value, origin, items))
    return found


def _from_variables(row: Row, environ: Mapping[str, str]) -> Given | None:
    """The setting's variable, or one of its other names; an empty one counts as not set."""
    found: list[Given] = []
    for name, convert in {row.setting.env: str, **row.setting.aliases}.items():
        text = environ.get(name, "")
        if text:
            origin = Origin("environment", name)
            found.append(give(row, _converted(row, origin, convert, text), origin))
    for other in found[1:]:
        if other.value != found[0].value:
            what = f"{found[0].origin} and {other.origin}: {row.key}: two names of one setting, with different values"
            raise ConfigError("alias_conflict", what, f"unset {other.origin.place}; {found[0].origin.place} is the name to use")
    return found[0] if found else None


def _converted(row: Row, origin: Origin, convert: Any, text: str) -> str:
    try:
        return str(convert(text))
    except ValueError as error:
        raise ConfigError("bad_value", f"{origin}: {row.key}: {error}", row.setting.help) from None


def from_environment(environ: Mapping[str, str], table: Table) -> list[Given]:
    given = (_from_variables(row, environ) for row in table.values())
    return [item for item in given if item is not None]


def misspelt(environ: Mapping[str, str], table: Table) -> list[str]:
    """Warnings on variables that look like a setting of ours and are none. (VLLM_* are the engine's too: no guess there.)"""
    known = [row.setting.env for row in table.values() if row.setting.env.startswith("VLLMD_")]
    warnings = []
    for name in sorted(environ):
        if name.startswith("VLLMD_") and name not in known:
            meant = closest(name.lower(), [other.lower() for other in known]).upper()
            warnings += [f"{name} (environment): unknown, did you mean {meant}?"] if meant else []
    return warnings


def from_command_line(overrides: Mapping[str, object], table: Table, *, partial: bool = False) -> list[Given]:
    """KEY=VALUE of --set and of options that set a row. UsageError on an unknown key."""
    found = []
    for name, value in overrides.items():
        for key, item in (model_words(value) if name == "model" else {name: value}).items():
            row = table.get(key)
            if row is not None:
                found.append(give(row, item, Origin("command line", name)))
            elif not partial:
                meant = closest(key, table)
                hint = f"did you mean {meant}?" if meant else "vllmd.yaml(5) lists the settings"
                raise UsageError("unknown_key", f"command line: {key}: unknown key", hint)
    return found
