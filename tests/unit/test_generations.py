"""What two generations differ in, and the names that a set of files gets."""

from __future__ import annotations

import pytest

from vllmd.instance.generations import changes, sum_of

pytestmark = pytest.mark.unit


def test_a_set_of_files_is_named_by_names_and_contents() -> None:
    assert sum_of({"a": "1", "b": "2"}) == sum_of({"b": "2", "a": "1"})
    assert len({sum_of({"a": "1"}), sum_of({"a": "2"}), sum_of({"b": "1"})}) == 3


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"settings": {"serve.port": 1}}, {"settings": {"serve.port": 2}}, ["serve.port: 1 -> 2"]),
        ({"settings": {"gpus": "all"}}, {"settings": {}}, ["gpus: all -> not set"]),
        ({"model": {"version": "a" * 64}}, {"model": {"version": "b" * 64}}, ["model version: aaaaaaaaaaaa -> bbbbbbbbbbbb"]),
        ({"engine": {"version": "1"}}, {"engine": {"version": "2", "executable": "/x"}}, ["engine version: 1 -> 2"]),
        ({"configuration": "x"}, {"configuration": "y"}, ["the text of the files, no setting"]),
        ({"settings": [1], "model": "x"}, {"settings": None, "model": {}}, []),
    ],
)
def test_what_changed_is_said_whatever_the_records_hold(before: dict[str, object], after: dict[str, object], told: list[str]) -> None:
    assert list(changes(before, after)) == told
