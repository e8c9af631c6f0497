"""One value that one layer gives: parsed by its row, with the place that an error or `check --show-origin` names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vllmd.config.rows import Row
from vllmd.config.values import REDACTED, FrozenDict, Warned, shown
from vllmd.errors import ConfigError, UsageError, VllmdError

_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from. `place` is the file, variable or option; `raw` the text as written (secrets redacted)."""

    kind: Literal["built-in", "file", "environment", "command line"]
    place: str = ""
    line: int = 0
    raw: str = ""

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.place}:{self.line}"
        return f"{self.place} (environment)" if self.kind == "environment" else self.kind


BUILT_IN = Origin("built-in")


@dataclass(frozen=True, slots=True)
class Given:
    """`removed` are names of a merged mapping that the layer takes away (null); `items` say where each name stands."""

    row: Row
    value: Any
    origin: Origin
    removed: tuple[str, ...] = ()
    items: Mapping[str, Origin] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def raw_text(row: Row, value: object) -> str:
    """What was written, on one line, for people; a mapping may hold secrets of others, so only its names."""
    if row.setting.secret:
        return REDACTED
    if isinstance(value, Mapping):
        return "{" + ", ".join(map(str, value)) + "}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text.isprintable() else repr(text)


def described(row: Row) -> str:
    """The hint under a bad value: what the setting is."""
    unit = f" in {row.setting.unit}" if row.setting.unit else ""
    return f"{row.key}: {row.setting.help.rstrip('.')} ({row.form}{unit})"


def bad_value(row: Row, origin: Origin, value: object, reason: str) -> VllmdError:
    """One line with the place, the key and the reason; one line with what the setting is."""
    if row.setting.secret:
        reason = reason.replace(shown(value), REDACTED)
    kind: type[VllmdError] = UsageError if origin.kind == "command line" else ConfigError
    return kind("bad_value", f"{origin}: {row.key}: {reason}", described(row))


def _service_link(row: Row, origin: Origin, value: object) -> ConfigError | None:
    """Kubernetes gives each pod NAME_PORT=tcp://ADDRESS:PORT for a Service called NAME; one called vllm hits VLLM_PORT."""
    if origin.kind != "environment" or not isinstance(value, str) or not _SERVICE_LINK.match(value):
        return None
    what = f"{origin}: {row.key}: {value!r} is a service link that Kubernetes injected, not a setting"
    return ConfigError("service_link", what, "set enableServiceLinks: false in the pod's spec, or rename the Service")


def give(row: Row, value: object, origin: Origin, items: Mapping[str, Origin] | None = None) -> Given:
    """Parse a value at the door. ConfigError (UsageError from the command line) with its place where it is bad."""
    origin = replace(origin, raw=raw_text(row, value))
    removed: tuple[str, ...] = ()
    if row.merges and isinstance(value, Mapping):
        removed = tuple(str(name) for name, item in value.items() if item is None)
        value = {name: item for name, item in value.items() if item is not None}
    try:
        parsed = row.setting.parse(value)
    except ValueError as error:
        raise _service_link(row, origin, value) or bad_value(row, origin, value, str(error)) from None
    if isinstance(parsed, Warned):
        reasons = tuple(f"{origin}: {row.key}: {reason}" for reason in parsed.reasons)
        return Given(row, parsed.value, origin, removed, items or {}, reasons)
    return Given(row, parsed, origin, removed, items or {})


def merged(below: Given, above: Given) -> Given:
    """A mapping of a lower layer with that of a higher one over it, name by name."""
    kept = {name: item for name, item in below.value.items() if name not in above.removed}
    items = {name: origin for name, origin in below.items.items() if name in kept}
    value = FrozenDict({**kept, **above.value})
    return replace(above, value=value, items={**items, **above.items}, removed=())
