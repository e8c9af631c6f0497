"""docs/json.md names every verb that has --json, and the checker that holds it against real output finds what differs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import json_docs
from tests.unit.test_seeing import ENTRY
from tools.package.commands import commands
from vllmd.ctl import events

pytestmark = pytest.mark.unit

_TABLE = {"a[].b": (frozenset({"integer"}), True), "a[].c": (frozenset({"string", "null"}), False), "d": (frozenset({"object"}), True), "d{}": (frozenset({"any"}), True)}


def test_every_verb_with_json_is_documented() -> None:
    """There, or beside what else is told of it."""
    told = set(re.findall(r"(?m)^## vllmctl ([a-z-]+(?: [a-z]+)?)", json_docs.PAGE.read_text())) | {"restart", "resume", "model clear"}
    pages = "\n".join(page.read_text() for page in json_docs.PAGE.parent.glob("*.md"))
    verbs = [verb for command in commands() if command.words == ("vllmctl",) for verb in command.walk()]
    having = {" ".join(verb.words[1:]) for verb in verbs if any("--json" in option.flags for option in verb.options)}
    missing = [verb for verb in sorted(having - told) if not re.search(rf"{verb}(?: [\[\]A-Z|]+)* --json", pages)]
    assert not missing, f"no section in docs/json.md: {missing}"


def test_every_table_is_held_against_what_is_really_printed() -> None:
    """By some test that names it: a table that nobody compares rots."""
    tests = Path(__file__).parents[1]
    words = "\n".join(path.read_text() for path in sorted(tests.rglob("test_*.py")) if path != Path(__file__))
    assert [heading for heading in json_docs.tables() if f'"{heading}"' not in words] == []


def test_an_event_is_as_documented() -> None:
    assert json_docs.differences("vllmctl events [NAME] --json", events.as_dict(ENTRY)) == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"a": [{"b": 1, "c": None}], "d": {"x": [1]}}, []),
        ({"a": [{"b": 1}], "d": {}}, []),
        ({"a": [{"b": True}], "d": {}}, ["a[].b: True is no integer"]),
        ({"a": [{}], "d": {}}, ["a[].b: is missing"]),
        ({"a": [], "d": {}, "e": 1}, ["e: documented nowhere"]),
        ({"a": [{"b": 1, "f": 2}], "d": 3}, ["a[].f: documented nowhere", "d: 3 is no object"]),
        ({"a": []}, ["d: is missing"]),
    ],
)
def test_what_differs_is_found(value: object, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_docs, "tables", lambda: {"x": _TABLE})
    assert json_docs.differences("x", value) == found
