"""The rows as one table, by key: what layers, `check`, the man page, the example and the JSON schema are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllmd.config import parsers
from vllmd.config.settings import (
    Config,
    EngineChoice,
    GpuWatch,
    Log,
    Metrics,
    Model,
    Preflight,
    Serve,
    Setting,
    Start,
    Stop,
    Watch,
    rows,
)

SECTIONS: Mapping[str, type[Any]] = {
    "model": Model,
    "serve": Serve,
    "engine": EngineChoice,
    "preflight": Preflight,
    "start": Start,
    "stop": Stop,
    "watch": Watch,
    "gpu_watch": GpuWatch,
    "log": Log,
    "metrics": Metrics,
}


@dataclass(frozen=True, slots=True)
class Row:
    """`attribute` is where it stands in Config ('' at the top, 'tuning' for the engine's own)."""

    key: str
    attribute: str
    name: str
    default: Any
    setting: Setting

    @property
    def merges(self) -> bool:
        """A mapping is merged name by name over the layers; everything else is replaced."""
        return self.setting.parse in (parsers.mapping, parsers.env_mapping)

    @property
    def form(self) -> str:
        return getattr(self.setting.parse, "form", "value")

    def of(self, config: Config) -> Any:
        return getattr(getattr(config, self.attribute) if self.attribute else config, self.name)


def _section(kind: type[Any], prefix: str, attribute: str) -> list[Row]:
    return [Row(key, attribute, name, default, row) for key, name, default, row in rows(kind, prefix)]


def table(tuning: type[Any] | None) -> dict[str, Row]:
    """Every row by its key, in the order of documentation; the engine's own (`tuning`) follow those of `serve`."""
    found = _section(Config, "", "")
    for name, kind in SECTIONS.items():
        found += _section(kind, name, name)
        if name == "serve" and tuning is not None:
            found += _section(tuning, name, "tuning")
    result = {row.key: row for row in found}
    assert len(result) == len(found), "an engine's row must not have the name of one of serve's"
    return result


def closest(wrong: str, keys: Iterable[str]) -> str:
    """The key that was probably meant, or ''. A right name in a wrong section counts, and so does a hyphen."""
    import difflib  # needed for errors only

    keys = list(keys)
    wrong = wrong.replace("-", "_").lower()
    same_name = [key for key in keys if key.rpartition(".")[2] == wrong.rpartition(".")[2]]
    near = difflib.get_close_matches(wrong, keys, n=1, cutoff=0.75)
    by_name = {key.rpartition(".")[2]: key for key in keys}
    near_name = difflib.get_close_matches(wrong.rpartition(".")[2], by_name, n=1, cutoff=0.75)
    return next(iter([*(same_name if wrong not in keys else [wrong]), *near, *(by_name[name] for name in near_name)]), "")
