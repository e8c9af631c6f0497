"""vllmd-journal(7) says of every kind what the code does: which levels, which fields; and the page is made from the rows."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.unit.test_messages_told import ELSEWHERE, HOST, ROOT, constants
from tools import journal_page as page
from vllmd.system.messages import MESSAGES

pytestmark = pytest.mark.unit

LEVELS = {
    ("judging", "priority"): {3},
    ("resolution", "LEVELS[progress.level]"): {4, 6},
}
"""Where a level is chosen at run time: what it can be."""
HOST_LEVELS = {"gpu-finding": {3, 4, 5}, "gpu-would-quarantine": {4}, "gpu-stuck": {3}, "gpu-quarantined": {3}, "gpu-quarantine-failed": {3}, "gpu-released": {5}}
FINDINGS = {"gpu-finding", "gpu-would-quarantine", "gpu-stuck"}
"""Of the watch's two places that write, the one that names a process."""
ALSO = {("gpuwatch", "_fields(finding)"): {"detector", "xid", "gpu"}}
OF_A_VERDICT = {"hint", "detector", "code"}
"""`reach` of the judge hands the kind on, and adds these."""


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"event", "reach"}:
                yield path.stem, node, node.func.attr


def kinds_of(module: str, node: ast.Call) -> set[str]:
    given = next((each.value for each in node.keywords if each.arg == "event"), node.args[0] if node.args else None)
    if given is None:
        return set()
    told = constants(given)
    if (module, ast.unparse(given)) == ("host", "event"):
        return FINDINGS if any(each.arg == "process" for each in node.keywords) else HOST - FINDINGS
    return ELSEWHERE[module, ast.unparse(given)] if told is None else told


def levels_of(module: str, node: ast.Call, method: str) -> set[int]:
    given = next((each.value for each in node.keywords if each.arg == "priority"), None)
    match given:
        case None:
            return {3 if method == "reach" else 6}
        case ast.Constant(value=int() as level):
            return {level}
        case ast.IfExp(body=ast.Constant(value=int() as one), orelse=ast.Constant(value=int() as other)):
            return {one, other}
    return LEVELS[module, ast.unparse(given)]


def fields_of(module: str, node: ast.Call, method: str) -> set[str]:
    if method == "reach":
        return OF_A_VERDICT
    named = {each.arg for each in node.keywords if each.arg not in (None, "event", "priority")}
    return {str(name) for name in named}.union(*(ALSO[module, ast.unparse(each.value)] for each in node.keywords if each.arg is None))


@functools.cache
def written() -> dict[str, tuple[set[int], set[str]]]:
    found: defaultdict[str, tuple[set[int], set[str]]] = defaultdict(lambda: (set(), set()))
    for module, node, method in calls():
        for kind in kinds_of(module, node):
            levels, fields = found[kind]
            levels |= HOST_LEVELS[kind] if kind in HOST_LEVELS else levels_of(module, node, method)
            fields |= fields_of(module, node, method)
    found["lines-dropped"][0].add(4)
    found["lines-dropped"][1].update({"dropped_lines", "dropped_events"})  # the sink's own entry, which no call of these writes
    found["gpu-released"][1].discard("hint")  # which is empty there, and so left out
    return found


@pytest.mark.parametrize("kind", MESSAGES)
def test_levels_and_fields_are_those_of_the_code(kind: str) -> None:
    levels, fields = written()[kind]
    row = page.ROWS[kind]
    assert set(row.levels) == {page.LEVELS[level] for level in levels}
    assert set(row.fields) == fields


def test_every_kind_is_on_the_page_once() -> None:
    assert set(page.ROWS) == set(MESSAGES)
    assert {kind for kind, row in page.ROWS.items() if row.section is page.Section.HOST} == HOST | {
        "gpu-watching", "gpu-log-unreadable", "gpu-driver-gone", "gpu-driver-back"
    }
    text = page.PAGE.read_text()
    for kind, row in MESSAGES.items():
        assert text.count(f"### {kind}\n") == 1
        assert row.id in text


def test_every_field_is_explained() -> None:
    used = {name for row in page.ROWS.values() for name in row.fields}
    always = {"instance", "event", "launch", "stream"}
    assert set(re.findall(r"(?m)^\| `VLLMD_([A-Z_]+)`", page.PAGE.read_text())) == {name.upper() for name in used | always}


def test_the_page_is_what_the_rows_say() -> None:
    assert page.PAGE.read_text() == page.whole(), "run: python -m tools.journal_page"
