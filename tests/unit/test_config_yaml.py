"""YAML as hostile input: every way in which it must not hurt, and the line in each complaint."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmd.config import parsers, yamlfile
from vllmd.errors import ConfigError, PermissionMissing

pytestmark = pytest.mark.unit


@pytest.fixture(params=["c", "python"])
def _loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of PyYAML's parsers: the one in C may be absent."""
    if request.param == "c" and not hasattr(yaml, "CSafeLoader"):
        pytest.skip("this PyYAML has no C parser")
    monkeypatch.setattr(yamlfile, "Loader", yaml.CSafeLoader if request.param == "c" else yaml.SafeLoader)


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.usefixtures("_loader")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f:3: a: is given twice, first on line 1"),
        ("a:\n  b: 1\n  b: 2", "f:3: a.b: is given twice, first on line 2"),
        (BOMB, "f:5: holds more than"),
        ("a: &x [*x]", "f:1: *x refers to nothing"),
        ("[" * 50_000, "f:1: is nested deeper"),
        ("{a: " * 50_000, "f:1: is nested deeper"),
        ("a: [" + "1," * 30_000 + "]", "f:1: holds more than"),
        ("a: 1\nb: !!python/object/apply:os.system [id]", "f:2: the tag"),
        ("a: !!python/name:os.system x", "f:1: the tag"),
        ("a: !secret x", "f:1: the tag"),
        ("? [a]\n: b", "f:1: a key must be plain text"),
        ("? {a: 1}\n: b", "f:1: a key must be plain text"),
        ("a: 1\n---\nb: 2", "f:2: a second document"),
        ('a: 1\n"b\\n": 2', "f:2: the key 'b\\n' holds a line break"),
        ('"\\e[31m": 2', "f:1: the key"),
        ('"\\u202eb": 2', "f:1: the key"),
        ("- a", "f:1: must hold keys and values, not a list"),
        ("hello", "f:1: must hold keys and values, not plain text"),
        ("a: b: c", "f:1: is not YAML"),
        ("a:\n\tb: 1", "f:2: is not YAML"),
        ("a: 'x\n\n", "is not YAML"),
        ("a: \x01", "is not YAML"),
        ("\0", "is not YAML"),
    ],
)
def test_hostile_or_wrong_text_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        yamlfile.parse(text, "f")
    assert message in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.hint


@pytest.mark.usefixtures("_loader")
def test_only_decimal_numbers_are_numbers() -> None:
    text = "a: [1, -2, 1_000, 0700, 0x10, 22:30, 2026-01-01, 1e3, 1.5, .5, .inf, 99999999999999999999999]"
    expected = [1, -2, "1_000", "0700", "0x10", "22:30", "2026-01-01", "1e3", 1.5, ".5", ".inf", "99999999999999999999999"]
    assert yamlfile.parse(text, "f").values == {"a": expected}


@pytest.mark.usefixtures("_loader")
def test_a_number_that_becomes_text_again_is_as_it_was_written() -> None:
    value = yamlfile.parse("a: 1.10", "f").values["a"]
    assert value == 1.1
    assert [str(copied) for copied in (value, copy.deepcopy(value), pickle.loads(pickle.dumps(value)))] == ["1.10"] * 3
    assert json.dumps({"a": value}) == '{"a": 1.1}'
    assert parsers.env_mapping({"A": value}) == {"A": "1.10"}


@pytest.mark.usefixtures("_loader")
def test_words_quotes_blocks_and_keys() -> None:
    text = "on: yes\nb: 'yes'\nc: |\n  x\n  y\nd: ~\ne:\n1: Off\n"
    assert yamlfile.parse(text, "f").values == {"on": True, "b": "yes", "c": "x\ny\n", "d": None, "e": None, "1": False}


@pytest.mark.usefixtures("_loader")
def test_anchors_repeat_and_lines_are_known() -> None:
    document = yamlfile.parse("a: &x\n  b: [1,\n    2]\nc: *x\n", "f")
    assert document.values == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}
    assert (document.line("a", "b"), document.line("a", "b", 1), document.line("c"), document.line("c", "b"), document.line("zz")) == (2, 3, 4, 4, 1)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "~"])
def test_an_empty_file_is_an_empty_mapping(text: str) -> None:
    assert yamlfile.parse(text, "f").values == {}


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(10**17), 10**17), st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20))
TREES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text("abcXYZ_-", min_size=1, max_size=5), inner, max_size=4)), max_leaves=12)


@given(st.dictionaries(st.text("abcXYZ_-", min_size=1, max_size=5), TREES, max_size=5), st.booleans())
def test_what_the_dumper_writes_is_read_back(tree: dict[str, object], flow: bool) -> None:
    assert yamlfile.parse(yaml.safe_dump(tree, default_flow_style=flow), "f").values == tree


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@`,? \n\t0x1~<é\x00\x85\ufeff", max_size=60))
@settings(max_examples=400)
def test_any_text_is_a_mapping_or_one_error(text: str) -> None:
    complaint = ""
    try:
        yamlfile.parse(text, "f")
    except ConfigError as error:
        complaint = error.what
    assert "\n" not in complaint


def test_files_that_are_no_plain_yaml_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "dir.yaml").mkdir()
    (tmp_path / "giant.yaml").write_bytes(b"# " + b"x" * yamlfile.MAX_BYTES)
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    reasons = {"fifo": "not a regular", "dir": "not a regular", "giant": "larger than", "latin": "latin.yaml:2: is not UTF-8"}
    for name, reason in reasons.items():
        with pytest.raises(ConfigError, match=reason):
            yamlfile.load(tmp_path / f"{name}.yaml")
    with pytest.raises(FileNotFoundError):
        yamlfile.load(tmp_path / "none.yaml")


def test_a_file_that_may_not_be_read_is_a_missing_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionMissing, match="Permission denied") as caught:
        yamlfile.load(tmp_path / "x.yaml")
    assert "chmod 0640" in caught.value.hint
