"""The configuration as people and programs see it (`vllmd check`, `--show-origin`, `--json`): no secret stands in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllmd.config.given import BUILT_IN
from vllmd.config.layers import Loaded
from vllmd.config.redact import is_secret_name, redact_text
from vllmd.config.rows import Row, table
from vllmd.config.settings import Config
from vllmd.config.values import REDACTED


def config_rows(config: Config) -> dict[str, Row]:
    return table(type(config.tuning))


def secrets(config: Config) -> tuple[str, ...]:
    """The values that redaction removes from anything printed."""
    found = [row.of(config) for row in config_rows(config).values() if row.setting.secret]
    found += [value for name, value in config.engine.env.items() if is_secret_name(name)]
    found += [value for name, value in config.engine.args.items() if isinstance(value, str) and names_secret(name)]
    return tuple(value for value in found if value)


def _plain(value: Any, hidden: tuple[str, ...]) -> Any:
    """Lists and dicts as JSON has them, redacted to the leaves."""
    if isinstance(value, Mapping):
        return {name: REDACTED if item and names_secret(name) else _plain(item, hidden) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, hidden) for item in value]
    return redact_text(value, hidden) if isinstance(value, str) else value


def names_secret(name: str) -> bool:
    return is_secret_name(name.replace("-", "_"))


def shown_value(row: Row, config: Config) -> Any:
    """A row's value, fit for printing and for JSON."""
    value = row.of(config)
    if row.setting.secret:
        return REDACTED if value else ""
    return _plain(value, secrets(config))


def as_dict(loaded: Loaded) -> dict[str, Any]:
    """Sections of values, `gpus`, the origin of each key as text, warnings and files: for --json."""
    values: dict[str, Any] = {}
    for row in config_rows(loaded.config).values():
        section, _, name = row.key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = shown_value(row, loaded.config)
    return {
        "config": values,
        "origins": {key: str(origin) for key, origin in loaded.origins.items()},
        "warnings": list(loaded.warnings),
        "files": [str(path) for path in loaded.files],
    }


def _cell(value: Any) -> str:
    if isinstance(value, str) and value.isprintable() and value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _lines(loaded: Loaded) -> list[tuple[str, str, str, bool]]:
    """(key, value, origin, whether somebody set it); a mapping has a line for each of its names."""
    found = []
    for key, row in config_rows(loaded.config).items():
        value = shown_value(row, loaded.config)
        origin = loaded.origins.get(key, BUILT_IN)
        if row.merges and value:
            for name, item in value.items():
                found.append((f"{key}.{name}", _cell(item), str(loaded.origins.get(f"{key}.{name}", origin)), True))
        else:
            found.append((key, _cell(value) + (f" {row.setting.unit}" if row.setting.unit and value != "" else ""), str(origin), origin.kind != "built-in"))
    return found


def origin_table(loaded: Loaded, *, only_set: bool = False) -> str:
    """Lines of key, value and origin, in columns; `only_set` leaves out what is built in."""
    lines = [(key, value, origin) for key, value, origin, was_set in _lines(loaded) if was_set or not only_set]
    wide = [min(max((len(line[i]) for line in lines), default=0), limit) for i, limit in ((0, 40), (1, 44))]
    return "\n".join(f"{key:<{wide[0]}}  {value:<{wide[1]}}  {origin}".rstrip() for key, value, origin in lines)
