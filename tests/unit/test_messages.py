"""The table of events and the catalog made from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllmd.system.messages import MESSAGES, catalog, message_id

pytestmark = pytest.mark.unit

CATALOG = Path(__file__).parents[2] / "units/vllmd.catalog"


def test_the_catalog_is_what_the_table_says() -> None:
    assert CATALOG.read_text() == catalog(), "run: python -m vllmd.system.messages > units/vllmd.catalog"


def test_ids_are_distinct_and_128_bits_wide() -> None:
    ids = [kind.id for kind in MESSAGES.values()]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


def test_every_event_is_explained_with_what_to_do() -> None:
    for event, kind in MESSAGES.items():
        assert "\n" in kind.text, event
        assert "\n\n" not in kind.text, event  # an empty line is kept by journalctl, a `--` line would end the entry
        assert not re.search("^--", kind.text, re.MULTILINE), event


def test_released_ids_never_change() -> None:
    assert message_id("engine-ready") == "d008bacaea1e44afa056921240bc1724"
    assert message_id("failed") == "fd39de1393094ad7a6ef5edef190c153"
