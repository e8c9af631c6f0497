"""docs/json.md as a schema, with the table of docs/doctor.md: what a command printed is held against the tables there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs/json.md"
PAGES = (PAGE, PAGE.with_name("doctor.md"))
_ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \|(.*)\|$", re.MULTILINE)
_KINDS: Mapping[str, Any] = {"string": str, "boolean": bool, "object": dict, "list": list, "null": type(None)}
Table = dict[str, tuple[frozenset[str], bool]]
"""Path -> its types, and whether it is always there."""


def tables() -> dict[str, Table]:
    """Heading -> table; headings without one are left out."""
    found = {}
    for part in re.split(r"(?m)^## ", "\n".join(page.read_text(encoding="utf-8") for page in PAGES))[1:]:
        rows = {path: (frozenset(kind.strip().split(" or ")), "not always" not in meaning) for path, kind, meaning in _ROW.findall(part)}
        if rows:
            found[part.splitlines()[0].strip()] = rows
    return found


def differences(heading: str, value: Any) -> list[str]:
    """What is not as documented: fields of another type, missing ones, and those that stand nowhere."""
    table = tables()[heading]
    return [*_wrong(table, value, ""), *_missing(table, value, "")]


def _wrong(table: Table, value: Any, path: str) -> Iterator[str]:
    for name, item in value.items() if isinstance(value, dict) else (("[]", each) for each in value) if isinstance(value, list) else ():
        own = f"{path}[]" if name == "[]" else f"{path}.{name}".removeprefix(".")
        known = table.get(own) or (table.get(f"{path}{{}}") if name != "[]" else None)
        is_above = any(other.startswith((f"{own}.", f"{own}[", f"{own}{{")) for other in table)
        if known is None and not is_above and not (table.get(path, (frozenset(), True))[0] & {"object"} and not _has_fields(table, path)):
            yield f"{own}: documented nowhere"
        elif known is not None and not any(_is(item, kind) for kind in known[0]):
            yield f"{own}: {item!r} is no {' or '.join(sorted(known[0]))}"
        elif known is None or "any" not in known[0]:
            yield from _wrong(table, item, own)


def _has_fields(table: Table, path: str) -> bool:
    return any(other.startswith((f"{path}.", f"{path}{{")) for other in table)


def _missing(table: Table, value: Any, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from _missing(table, each, f"{path}[]")
    elif isinstance(value, dict):
        depth = f"{path}." if path else ""
        names = {re.split(r"[.\[{]", other.removeprefix(depth))[0] for other, (_, always) in table.items() if other.startswith(depth) and always}
        yield from (f"{depth}{name}: is missing" for name in names - value.keys() if name)
        for name, each in value.items():
            yield from _missing(table, each, f"{depth}{name}")


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return kind == "any" or isinstance(value, _KINDS[kind])
