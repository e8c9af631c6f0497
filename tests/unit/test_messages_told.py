"""Every kind of journal entry that the code writes has a row, every row is written by some code, and each says what to do."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_monitoring import RULES
from vllmd.config.rows import table
from vllmd.core.faults import CAUSES
from vllmd.daemon import STAGE_EVENTS
from vllmd.engines.vllm_tuning import Tuning
from vllmd.system.messages import MESSAGES, Kind

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2] / "vllmd"
WRITERS = {"event", "reach"}
"""Methods that take a kind: of the journal as their first argument, of the judge as `event`."""
ELSEWHERE = {
    ("daemon", "STAGE_EVENTS[name]"): set(STAGE_EVENTS.values()),
    ("engine_life", "kind"): {"start-timeout", "start-stalled"},
    ("incident", "cause.event"): {row.event(code) for code, row in CAUSES.items()},
    ("watching", "finding.code.replace('_', '-')"): {"engine-hung", "engine-unhealthy"},
    ("judging", "event"): set(),  # what it was given by `reach`
    ("host", "event"): {"gpu-finding", "gpu-stuck", "gpu-would-quarantine", "gpu-quarantined", "gpu-quarantine-failed", "gpu-released"},
    ("faults", "code"): set(),  # the name of a kind, written by `incident`
}
"""Kinds that are chosen at run time: where, and which they can be."""
HOST = ELSEWHERE["host", "event"]
DOES = re.compile(r"`[^`]+`|\b[a-z]+\.[a-z]+(_[a-z]+)*\b|gpus_shared|Nothing needs to be done|nothing needs to be done|may be removed")


def constants(node: ast.expr) -> set[str] | None:
    """The texts that an expression can be; None where it is more than a choice between texts."""
    match node:
        case ast.Constant(value=str() as text):
            return {text} - {""}
        case ast.IfExp(body=body, orelse=orelse):
            one, other = constants(body), constants(orelse)
            return None if one is None or other is None else one | other
    return None


def written() -> Iterator[tuple[str, int, set[str] | None, str]]:
    """(module, line, kinds, source) of each call that writes an entry."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITERS:
                by_name = [keyword.value for keyword in node.keywords if keyword.arg == "event"]
                for argument in by_name or node.args[:1]:
                    yield path.stem, node.lineno, constants(argument), ast.unparse(argument)


def kinds() -> set[str]:
    found: set[str] = set()
    for module, line, told, source in written():
        if told is None:
            assert (module, source) in ELSEWHERE, f"{module}:{line}: say in ELSEWHERE which kinds {source} can be"
            told = ELSEWHERE[module, source]
        found |= told
    return found


def test_every_kind_that_is_written_has_a_row() -> None:
    """The journal's adapter raises KeyError for one that has none; in the foreground nobody would see."""
    assert kinds() - set(MESSAGES) == set()


def test_every_row_is_written_by_some_code() -> None:
    assert set(MESSAGES) - kinds() == set()


@pytest.mark.parametrize("kind", MESSAGES.values(), ids=list(MESSAGES))
def test_a_row_ends_with_something_to_do_or_says_that_nothing_is(kind: Kind) -> None:
    last = "\n".join(kind.text.splitlines()[-2:])
    assert DOES.search(last), kind.text
    assert kind.text.endswith((".", ")."))
    assert "\n" not in kind.subject
    assert not kind.subject.endswith(".")


def test_only_fields_that_are_always_there_are_filled_in() -> None:
    """journalctl shows an unknown @FIELD@ as it stands."""
    always = {"VLLMD_INSTANCE"}
    with_more = {"engine-spawned": {"VLLMD_PID"}, "phase": {"VLLMD_PHASE"}}
    for name, kind in MESSAGES.items():
        fields = set(re.findall(r"@([A-Z_]+)@", kind.subject + kind.text))
        more = {"VLLMD_INCIDENT"} if name.startswith("cause-") else {"VLLMD_GPU"} if name in HOST else with_more.get(name, set())
        assert fields <= always | more, name


TEXTS = {
    **{name: kind.subject + "\n" + kind.text for name, kind in MESSAGES.items()},
    **{rule["alert"]: json.dumps(rule["annotations"]) for rule in RULES},
}
"""Of journal and alerts: what a person reads at night."""


def test_commands_that_are_named_exist() -> None:
    fronts = [path for name in ("ctl/*", "cli", "commandline", "verbs") for path in ROOT.glob(f"{name}.py")]
    known = "\n".join(path.read_text(encoding="utf-8") for path in fronts)
    for name, text in TEXTS.items():
        for program, verb in re.findall(r"`(vllmctl|vllmd) ([a-z-]+)", text):
            assert f'"{verb}"' in known, f"{name}: {program} {verb}"


def test_settings_that_are_named_exist() -> None:
    keys = set(table(Tuning))
    sections = {key.partition(".")[0] for key in keys}
    for name, text in TEXTS.items():
        for key in re.findall(r"(?<![\w/.@`-])([a-z]+\.[a-z_]+)\b(?!\()", text):
            if key.partition(".")[0] in sections and not key.endswith(".json"):
                assert key in keys, f"{name}: {key}"
