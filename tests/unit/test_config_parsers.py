"""Values at the door: what is accepted, what is refused, and that the reason helps."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.config import parsers as p
from vllmd.config.rows import table
from vllmd.config.values import Warned

pytestmark = pytest.mark.unit

Parse = Callable[[object], Any]


@pytest.mark.parametrize(
    ("parse", "value", "expected"),
    [
        (p.boolean, "YES", True),
        (p.boolean, "0", False),
        (p.boolean, False, False),
        (p.boolean01, "1", True),
        (p.boolean01, True, True),
        (p.number(low=0), "0.5", 0.5),
        (p.number(low=0), 3, 3.0),
        (p.integer(low=1, high=65535), "65535", 65535),
        (p.integer(), 10**17 + 1, 10**17 + 1),
        (p.choice("", "DEBUG", "INFO"), "info", "INFO"),
        (p.choice("", "DEBUG"), "", ""),
        (p.subset("temperature", "memory"), "memory, temperature,memory", ("memory", "temperature")),
        (p.subset("temperature"), ["Temperature"], ("temperature",)),
        (p.listing, "a, b,,c", ("a", "b", "c")),
        (p.sources, "flox,local,s3,r2", ("bundled", "local", "r2")),
        (p.host, "::1", "::1"),
        (p.host, "[::]", "::"),
        (p.host, "gpu-1.example", "gpu-1.example"),
        (p.model_name, "Llama-3.1 8B", "Llama-3.1 8B"),
        (p.model_id, "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        (p.revision, "refs/pr/3", "refs/pr/3"),
        (p.absolute_path, "/a//b/../c/", "/a/c"),
        (p.absolute_path, "", ""),
        (p.gpus, "ALL", "all"),
        (p.gpus, "2", 2),
        (p.gpus, "0,1", ("0", "1")),
        (p.gpus, "0,", ("0",)),
        (p.gpus, [0, "GPU-8f3a-1"], ("0", "GPU-8f3a-1")),
        (p.gpus, "MIG-GPU-8f3a-1/2/0", ("MIG-GPU-8f3a-1/2/0",)),
        (p.mib_or_auto, "AUTO", "auto"),
        (p.mib_or_auto, 4096, "4096"),
        (p.mapping, '{"a": [1, {"b": null}]}', {"a": (1, {"b": None})}),
        (p.env_mapping, {"A": 1, "B": 0.5, "C": "x"}, {"A": "1", "B": "0.5", "C": "x"}),
    ],
)
def test_accepted(parse: Parse, value: object, expected: object) -> None:
    found = parse(value)
    assert found == expected
    assert type(found) is type(expected) or isinstance(found, dict)


@pytest.mark.parametrize(
    ("parse", "value", "reason"),
    [
        (p.boolean, "on", "must be true or false"),
        (p.boolean, 2, "must be true or false"),
        (p.boolean01, "true", "must be 0 or 1"),
        (p.boolean01, "01", "must be 0 or 1"),
        *((p.number(low=0), text, "plain number") for text in ("1e3", "+1", "-1", ".5", "1.", " 1", "٣", "0x10", "1\n", "inf", "")),
        (p.number(low=0), float("nan"), "finite"),
        (p.number(low=0), True, "must be a number"),
        (p.number(low=0), -1, "at least 0"),
        (p.number(above=0), "0", "more than 0"),
        (p.number(high=100), 100.5, "at most 100"),
        (p.integer(low=1, high=65535), "0", "at least 1 and at most 65535"),
        (p.integer(), 1.5, "whole number"),
        (p.integer(), "1.0", "whole number"),
        (p.integer(), 10**30, "out of range"),
        (p.choice("tcp", "uds"), "udp", "must be one of tcp, uds"),
        (p.subset("temperature", "memory"), "memory,power", "'power'; possible are temperature, memory"),
        (p.sources, "nowhere", "names no known source"),
        (p.text, 5, "write it in quotes"),
        (p.text, "a\0b", "NUL"),
        (p.text, None, "not empty"),
        (p.one_line, "a\nb", "line break"),
        (p.word, "a b", "one word"),
        (p.host, "http://x", "host name"),
        (p.host, "999.1.1.1", "not a valid IPv4"),
        (p.host, "-x", "host name"),
        (p.host, "a b", "host name"),
        (p.regex, "(", "not a regular expression"),
        *((p.model_name, text, "") for text in ("a/b", ".", "..", "a\\b", "a\tb", "-x", " a")),
        *((p.model_id, text, "") for text in ("../x", "a/../b", "/a", "a//b", "a/b/c", "~/x", "./x", "a/", "--x/y", "a\nb")),
        *((p.revision, text, "") for text in ("a/../b", "a b", "-x", "/a", "a//b", "é")),
        (p.revision, 1e10, "write it in quotes"),
        (p.absolute_path, "a/b", "absolute"),
        (p.absolute_path, "~nobody-of-this-name/x", "no home directory"),
        *((p.gpus, bad, "") for bad in ("0", -1, True, [], "GPU", "x,y", [0, 0], "0:1", "all,1", "99999999999", None, "00,1", [0, "00"])),
        (p.seconds(), 10**17, "at most"),
        (p.seconds(above=0), 0, "more than 0"),
        (p.text, "\ud800", "surrogate"),
        (p.mib_or_auto, "4GiB", "must be auto or a whole number of MiB"),
        (p.mapping, "[1]", "must be a mapping"),
        (p.mapping, "{", "JSON object"),
        (p.mapping, "[" * 100_000, "JSON object"),
        (p.mapping, {1: 2}, "must be text"),
        (p.env_mapping, {"A": True}, "write it in quotes"),
        (p.env_mapping, {"A=B": "x"}, "not a name"),
        (p.env_mapping, {"A": "x\0"}, "A: contains a NUL"),
        (p.env_mapping, {"A": "\ud800"}, "surrogate"),
        (p.gib_to_mib, "nan", "plain number"),
    ],
)
def test_refused_with_a_reason(parse: Parse, value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason) or None) as caught:
        parse(value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_unknown_sources_warn_and_are_skipped() -> None:
    found = p.sources(["flox", "ipfs", "local"])
    assert found == Warned(("bundled", "local"), ("unknown source 'ipfs' skipped",))


def test_a_leading_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert p.absolute_path("~/models") == "/home/x/models"


def test_nested_deeper_than_any_configuration_is_refused() -> None:
    value: object = 1
    for _ in range(100):
        value = [value]
    with pytest.raises(ValueError, match="nested deeper"):
        p.mapping({"a": value})


def test_parsed_mappings_cannot_be_changed_and_are_plain_to_json_and_pickle() -> None:
    value = p.mapping({"a": {"b": [1]}})
    with pytest.raises(TypeError):
        value["a"] = 1
    with pytest.raises(TypeError):
        value["a"].update(x=1)
    assert json.dumps(value) == '{"a": {"b": [1]}}'
    assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
    assert hash(value) == hash(p.mapping({"a": {"b": [1]}}))


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.text()), st.dictionaries(st.text(), st.text())))
def test_every_parser_gives_a_value_or_a_reason(value: object) -> None:
    for row in table(None).values():
        with suppress(ValueError):
            row.setting.parse(value)


def test_every_default_is_a_fixed_point_of_its_own_parser() -> None:
    for row in table(None).values():
        assert row.setting.parse(row.default) == row.default, row.key
