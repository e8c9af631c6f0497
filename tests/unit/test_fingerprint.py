"""The same crash has the same fingerprint in its next life, and another crash another one."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.core.fingerprint import of_traceback, root_cause, series, tracebacks
from vllmd.engines.vllm_faults import ECHOES

pytestmark = pytest.mark.unit

DATA = Path(__file__).parent / "data/faults"
NAMES = ("bad_arch", "bad_config", "bad_tp", "kv_util", "kv_zero", "max_len", "missing_dir", "missing_shard", "truncated_shard", "wrong_shape")


def lines_of(name: str) -> list[str]:
    return (DATA / f"{name}.log").read_text().split("\n")


def print_of(lines: list[str]) -> str:
    found = root_cause(lines, ECHOES)
    assert found is not None
    return of_traceback(found)


@pytest.mark.parametrize("name", NAMES)
def test_another_life_of_the_same_crash_has_the_same_fingerprint(name: str) -> None:
    """Other pids, times, line numbers, and another place of installation."""
    text = "\n".join(lines_of(name))
    other = re.sub(r"pid=\d+", "pid=4711", text)
    other = re.sub(r"\d\d-\d\d \d\d:\d\d:\d\d", "01-01 00:00:00", other)
    other = re.sub(r"line \d+", "line 1", other)
    other = other.replace("/opt/vllm/lib/python3.11/site-packages", "/srv/e/lib/python3.13/site-packages").replace("0x7f", "0x55")
    assert print_of(other.split("\n")) == print_of(text.split("\n"))


def test_different_crashes_have_different_fingerprints() -> None:
    prints = [print_of(lines_of(name)) for name in NAMES]
    assert len(set(prints)) == len(prints), prints


def test_the_cause_is_not_the_echo_of_those_who_waited() -> None:
    found = root_cause(lines_of("truncated_shard"), ECHOES)
    assert found is not None
    assert found.exception == "SafetensorError"
    assert len(tracebacks(lines_of("truncated_shard"))) > 1


def test_tracebacks_of_several_processes_that_are_mixed_line_by_line() -> None:
    one = [line for line in lines_of("truncated_shard") if line.startswith("(Worker pid")]
    other = [line.replace("Worker pid=", "Worker_TP1 pid=9") for line in one]
    mixed = [line for pair in zip(one, other, strict=True) for line in pair]
    assert print_of(mixed) == print_of(one)
    assert len(tracebacks(mixed)) == 2 * len(tracebacks(one))


def test_a_series_ends_where_something_else_happened() -> None:
    assert series([], "a") == 1
    assert series(["a", "a"], "a") == 3
    assert series(["a", "b", "a"], "a") == 2
    assert series(["", ""], "") == 1, "no fingerprint is no sign of sameness"


@given(st.lists(st.text(max_size=60), max_size=40), st.randoms())
def test_any_lines_are_read_without_an_error(lines: list[str], chance: random.Random) -> None:
    real = lines_of("kv_zero")[60:110]
    mixed = [chance.choice([*lines, ""]) if chance.random() < 0.3 else line for line in real] + lines
    for found in tracebacks(mixed):
        assert of_traceback(found)


def test_a_line_of_ten_megabytes_costs_little() -> None:
    for line in ("(" * 10_000_000, 'File "' + "a" * 10_000_000, "a." * 5_000_000 + ":"):
        assert tracebacks(["Traceback (most recent call last):", '  File "x", line 1, in f', line]) is not None
