"""What parsed values are made of: the parser type, immutable mappings, and text fit for an error message."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

REDACTED = "<redacted>"
MAX_TEXT = 65536
MAX_DEPTH = 32


class FrozenDict(dict[str, Any]):
    """A dict that stays as it was parsed. A dict, not a proxy, so that json, pickle and copy know it."""

    __slots__ = ()

    def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise TypeError("configuration cannot be changed after it was parsed")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]  # dataclasses take only hashable defaults
        return hash(json.dumps(self, sort_keys=True, default=str))

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return (FrozenDict, (dict(self),))


EMPTY = FrozenDict()


@dataclass(frozen=True, slots=True)
class Warned:
    """A value that was accepted, with what a person should know about it."""

    value: Any
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Parser:
    """A callable parser; `form` says in a few words what it accepts, `schema` says it as JSON schema."""

    parse: Callable[[object], Any]
    form: str
    schema: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, value: object) -> Any:
        return self.parse(value)


def parser(form: str, **schema: Any) -> Callable[[Callable[[object], Any]], Parser]:
    """Decorator: make a Parser of a function."""
    return lambda function: Parser(function, form, schema)


def shown(value: object) -> str:
    """A value in an error message: short and on one line."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Text for a terminal: what is no character of a line, as a hostile file name has it, is escaped; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


_YAML_KIND: dict[type[object], str] = {bool: "true or false", int: "a number", float: "a number"}


def finite_json(text: str | bytes) -> Any:
    """What JSON says. NaN and Infinity, which only Python's reader knows and only Python's writer prints, are null: what is read here
    is printed again for other programs. ValueError, RecursionError."""
    return json.loads(text, parse_constant=lambda _: None, parse_float=_finite)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def string_of(value: object) -> str:
    if isinstance(value, bool | int | float):
        raise ValueError(f"must be text, and YAML reads {shown(value)} as {_YAML_KIND[type(value)]}: write it in quotes")
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {kind_of(value)}")
    if len(value) > MAX_TEXT:
        raise ValueError(f"is longer than {MAX_TEXT} characters")
    if "\0" in value:
        raise ValueError("contains a NUL character")
    try:
        value.encode("utf-8", "surrogateescape")  # what an environment and a command line can hold
    except UnicodeEncodeError:
        raise ValueError("contains half of a surrogate pair, which is no character") from None
    return value


def kind_of(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def frozen(value: object, depth: int = 0) -> Any:
    """A deep copy that cannot be changed: mappings FrozenDict with text keys, lists tuples; anything odd a ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            string_of(key)
        return FrozenDict({key: frozen(item, depth + 1) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(frozen(item, depth + 1) for item in value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return string_of(value)
