"""The screen of `vllmctl top`, drawn from facts: every size, twenty instances, hostile words; and what keys do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.config.paths import root_paths
from vllmd.ctl.cells import clean, cut, fit, width
from vllmd.ctl.top_facts import Card, Facts, Gatherer, Row, row_of
from vllmd.ctl.top_frame import Line, frame, whole
from vllmd.ctl.top_view import SORTS, View, arranged, pressed, settled

pytestmark = pytest.mark.unit

AT = 1_795_276_800.0
READY = Row("qwen3", "ready", AT - 7200, running=3, waiting=2, tokens_per_s=812.4, prompt_tokens_per_s=2400.0, kv_cache_ratio=0.94, gpus=("GPU-1",), event="engine-ready", event_at=AT - 60, event_text="Serving qwen3", model="Qwen/Qwen3-8B", endpoint="http://127.0.0.1:8000")
LOADING = Row("llama", "starting", AT - 30, phase="loading-weights", fraction=0.43, progress="7 of 16 shards")
FAILED = Row("mistral", "failed", error="the model does not fit into the GPU's memory", hint="lower serve.max_model_len", restarts=3)
CARDS = (Card(0, "GPU-1", "NVIDIA H100 80GB HBM3", 61000, 81559, 64, 97, "leased", ("qwen3",)), Card(1, "GPU-2", "NVIDIA H100 80GB HBM3", 500, 81559, 91, 0, "quarantined", (), is_usable=False))
FACTS = Facts(AT, "gpuhost", (READY, LOADING, FAILED), CARDS)
EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\n\r\t\x00\ud800日本語e\u0301\u200b\U0001f600"
MANY = replace(FACTS, rows=tuple(replace(READY, name=f"instance-{number:02}", running=number) for number in range(20)))


def text(lines: list[Line]) -> list[str]:
    return ["".join(part for part, _ in line) for line in lines]


def shown(facts: Facts = FACTS, columns: int = 80, lines: int = 24, view: View | None = None) -> list[str]:
    return text(frame(facts, settled(view or View(), facts), columns, lines))


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40), (100, 28), (200, 60), (60, 12), (40, 8), (24, 4), (23, 4), (10, 2), (1, 1), (300, 5)])
@pytest.mark.parametrize("facts", [FACTS, MANY, Facts(AT), replace(MANY, cards=CARDS * 8), replace(FACTS, cards=(), gpu_note="no driver")], ids=["few", "many", "none", "cards", "no cards"])
@pytest.mark.parametrize("is_ascii", [False, True])
def test_a_frame_fills_the_screen_exactly(columns: int, lines: int, facts: Facts, is_ascii: bool) -> None:
    for view in (View(ascii=is_ascii), View(helps=True), View(gpus=False), View(details=False)):
        drawn = shown(facts, columns, lines, view)
        assert len(drawn) == lines
        assert {width(line) for line in drawn} == {columns}
        assert not is_ascii or all(line.isascii() for line in drawn) or not view.ascii


def test_80x24_says_what_matters() -> None:
    drawn = shown()
    assert drawn[0].startswith("vllmctl top  gpuhost   1 ready, 1 failed, 1 on the way   812 tokens/s")
    loading, failed, ready = drawn[2:5]
    assert ready.split()[:7] == ["●", "qwen3", "ready", "3", "2", "812.4", "94%"]
    assert "43%" in loading
    assert "█" in loading
    assert failed.startswith("× mistral")
    assert "the model does not" in failed
    gpus = [line for line in drawn if "NVIDIA" in line]
    assert ["59.6/80G" in gpus[0], "97%" in gpus[0], "64C" in gpus[0], "qwen3" in gpus[0]] == [True] * 4
    assert "quarantined" in gpus[1]
    assert drawn[-1].startswith("q quit")


def test_the_selected_one_is_told_in_full() -> None:
    drawn = "\n".join(shown(view=View(selected="mistral")))
    assert "error     the model does not fit into the GPU's memory" in drawn
    assert "hint      lower serve.max_model_len" in drawn
    drawn = "\n".join(shown(view=View(selected="qwen3")))
    assert "endpoint  http://127.0.0.1:8000   GPUs 0" in drawn
    assert "event     1min ago: Serving qwen3" in drawn


def test_a_wide_screen_shows_more() -> None:
    drawn = shown(columns=140, lines=40)
    assert "PRMT/S" in drawn[1]
    assert "2.4k" in drawn[4]
    assert "2h" in drawn[4]
    assert "GPU MEM" in drawn[1]


@pytest.mark.parametrize("number", [0, 7, 12, 19])
def test_the_selected_one_of_twenty_is_in_sight(number: int) -> None:
    drawn = shown(MANY, view=View(selected=f"instance-{number:02}"))
    assert any(line.startswith(f"● instance-{number:02}") for line in drawn)
    assert "of 20" in drawn[1]
    assert any("NVIDIA" in line for line in drawn), "the GPUs are in sight too"


def hostile() -> Facts:
    words: dict[str, Any] = dict.fromkeys(("name", "state", "phase", "progress", "error", "hint", "event", "event_text", "model", "endpoint", "paused_until"), EVIL)
    row = Row(**words, fraction=0.5, event_at=1e18, since=-1e18, warnings=(EVIL,), gpus=(EVIL,))
    return Facts(AT, EVIL, (row, replace(row, error="", name=EVIL + "2")), (Card(0, EVIL, EVIL, state=EVIL, owners=(EVIL,)),), EVIL, EVIL)


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40), (30, 6)])
def test_nothing_that_a_terminal_obeys_reaches_it(columns: int, lines: int) -> None:
    for view in (View(), View(ascii=True), View(selected=EVIL)):
        drawn = shown(hostile(), columns, lines, view)
        assert all(line.isprintable() for line in drawn)
        assert {width(line) for line in drawn} == {columns}
        assert all(line.isprintable() for line in whole(hostile(), view, columns))


@given(st.text(max_size=60), st.integers(0, 40))
def test_text_is_as_wide_as_it_is_said_to_be(words: str, cells: int) -> None:
    told = clean(words)
    assert told.isprintable() or told == ""
    assert clean(told) == told
    assert width(cut(told, cells)) <= cells
    assert width(fit(told, cells)) == cells


def test_one_frame_for_a_pipe_has_everything() -> None:
    lines = whole(replace(MANY, cards=CARDS * 6), View(), 80)
    assert sum("instance-" in line for line in lines) == 20
    assert sum("NVIDIA" in line for line in lines) == 12
    assert not any(line != line.rstrip() for line in lines)


# -- keys


def test_keys_select_sort_and_quit() -> None:
    view = settled(View(), FACTS)
    assert view.selected == "llama"
    assert pressed(view, "down", FACTS).selected == "mistral"
    assert pressed(view, "end", FACTS).selected == "qwen3"
    assert pressed(pressed(view, "end", FACTS), "pagedown", FACTS).selected == "qwen3"
    assert pressed(view, "up", FACTS).selected == "llama"
    assert pressed(view, "s", FACTS).sort == "state"
    assert pressed(view, "S", FACTS).sort == SORTS[-1]
    assert pressed(view, "q", FACTS).quits
    assert pressed(pressed(view, "?", FACTS), "esc", FACTS).helps is False
    assert pressed(view, "x", FACTS) == view
    assert pressed(View(), "down", Facts(AT)) == View()


def test_orders_put_first_what_is_looked_for() -> None:
    first = {sort: arranged(FACTS.rows, View(sort=sort))[0].name for sort in SORTS}
    assert first == {"name": "llama", "state": "mistral", "requests": "qwen3", "tokens": "qwen3", "kv": "qwen3"}
    assert arranged(FACTS.rows, View(is_reversed=True))[0].name == "qwen3"


def test_a_selection_survives_another_order_and_ends_with_its_instance() -> None:
    view = View(selected="qwen3", sort="tokens")
    assert settled(view, FACTS).selected == "qwen3"
    assert settled(view, replace(FACTS, rows=(FAILED,))).selected == "mistral"


# -- facts from files


def gathered(root: Path, status: Any, last: Any = None) -> Row:
    paths = root_paths(root)
    for directory, name, document in ((paths.instance_runtime("demo"), "status.json", status), (paths.instance_state("demo"), "last.json", last)):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(document if isinstance(document, str) else json.dumps(document))
    return Gatherer(paths, ["demo"]).facts(AT).rows[0]


def test_what_the_supervisor_says_is_shown(tmp_path: Path) -> None:
    load = {"running": 2, "waiting": 1, "tokens_per_s": 51.5, "prompt_tokens_per_s": None, "kv_cache_ratio": 0.25}
    event = {"at": "2026-11-21T00:00:00Z", "event": "engine-ready", "text": "Serving", "priority": 5}
    row = gathered(tmp_path, {"state": "ready", "phase": "ready", "since": "2026-11-21T00:00:00Z", "load": load, "last_event": event, "gpus": ["GPU-1"]})
    assert (row.state, row.running, row.waiting, row.tokens_per_s, row.prompt_tokens_per_s, row.kv_cache_ratio) == ("ready", 2, 1, 51.5, None, 0.25)
    assert (row.phase, row.event, row.event_at, row.gpus) == ("", "engine-ready", row.since, ("GPU-1",))


def test_what_ended_it_is_shown_and_figures_of_before_are_not(tmp_path: Path) -> None:
    error = {"code": "engine_exited", "what": "the engine ended", "hint": "look", "status": 70}
    row = gathered(tmp_path, {"state": "stopped", "load": {"running": 2}, "error": error}, {"error": error})
    assert (row.state, row.error, row.hint, row.running) == ("failed", "the engine ended", "look", None)


@pytest.mark.parametrize(
    "status",
    [
        "", "[]", "{", '{"state": "ready", "progress": {"fraction": NaN}, "load": {"running": 1e999, "kv_cache_ratio": -Infinity}}',
        '{"state": "ready", "load": {"running": %s}, "since": 1e300}' % ("9" * 4000), '{"state": 7, "load": [], "gpus": [1, {}], "warnings": [[]], "last_event": 3, "paused": "x"}',
        json.dumps({"state": EVIL, "phase": EVIL, "progress": {"text": EVIL, "fraction": 7e5}, "model": {"id": EVIL}, "last_event": {"text": EVIL, "event": EVIL, "priority": 1e12}}),
    ],
)  # fmt: skip
def test_files_of_hostile_content_are_harmless(tmp_path: Path, status: str) -> None:
    row = gathered(tmp_path, status)
    facts = Facts(AT, rows=(row,))
    assert all(line.isprintable() for line in shown(facts))
    json.dumps(facts.as_dict(), allow_nan=False)
    assert row.fraction is None or (0 <= row.fraction <= 1 and not math.isnan(row.fraction))


def test_a_file_is_read_again_only_when_it_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllmd.ctl import files

    gathered(tmp_path, {"state": "ready"})
    gatherer = Gatherer(root_paths(tmp_path), ["demo"])
    reads: list[tuple[str, ...]] = []
    real = files.read

    def read(base: Path, *names: str) -> dict[str, Any]:
        reads.append(names)
        return real(base, *names)

    monkeypatch.setattr(files, "read", read)
    assert [gatherer.facts(AT).rows[0].state for _ in range(3)] == ["ready"] * 3
    assert len(reads) == 1
    path = root_paths(tmp_path).instance_runtime("demo") / "status.json"
    path.with_suffix(".new").write_text('{"state": "draining"}')
    path.with_suffix(".new").rename(path)
    assert gatherer.facts(AT).rows[0].state == "draining"


def test_an_instance_s_gpu_memory_is_that_of_its_gpus() -> None:
    row = row_of("demo", "ready", {"gpus": ["GPU-1", "GPU-2"]}, None, None, CARDS)
    assert (row.gpu_used_mib, row.gpu_total_mib) == (61500, 163118)
