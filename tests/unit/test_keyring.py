"""What changes the keys of an instance, and what their file may hold."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.core import keyring
from vllmd.core.keyring import DEFAULT, Key, Refused, Ring
from vllmd.instance import keys

pytestmark = pytest.mark.unit

OLD, NEW = Key(DEFAULT, "old-value", "then"), Key(DEFAULT, "new-value", "now")
RING = Ring((OLD, Key("web", "web-value")))


def names(ring: Ring) -> list[str]:
    return [key.name for key in ring.keys]


def test_a_made_key_has_22_characters_of_its_alphabet() -> None:
    made = {keys.new_key("a").value for _ in range(200)}
    assert len(made) == 200
    assert all(re.fullmatch("[a-zA-Z0-9]{22}", value) for value in made)
    assert len(set("".join(made))) == len(keyring.ALPHABET) == 62


def test_a_rotation_keeps_the_old_one_for_a_while() -> None:
    ring = keyring.rotate(RING, NEW, 100.0)
    assert ring.get(DEFAULT) == NEW
    assert ring.get("default.old") == Key("default.old", "old-value", "then", 100.0)
    assert "web" in names(ring)
    again = keyring.rotate(ring, Key(DEFAULT, "newest-value"), 50.0)
    assert again.get("default.old2") == Key("default.old2", "new-value", "now", 50.0)
    assert again.get("default.old") == ring.get("default.old")
    assert names(keyring.rotate(RING, NEW, None)) == [DEFAULT, "web"]


def test_a_rotation_makes_no_key_live_longer() -> None:
    ring = Ring((Key("web", "web-value", until=10.0),))
    rotated = keyring.rotate(ring, Key("web", "other-value"), 99.0)
    assert rotated.get("web.old") == Key("web.old", "web-value", until=10.0)


def test_what_is_refused() -> None:
    for name in ("", "Web", "a b", "-a", "a" * 49, "a/b", "ä", "a\n"):
        with pytest.raises(Refused):
            keyring.add(RING, Key(name, "x" * 22))
    with pytest.raises(Refused, match="already"):
        keyring.add(RING, Key("web", "x" * 22))
    with pytest.raises(Refused, match="no key"):
        keyring.rotate(RING, Key("nobody", "x" * 22), None)
    with pytest.raises(Refused, match="no key"):
        keyring.revoke(RING, "nobody")
    with pytest.raises(Refused, match="dependents"):
        keyring.revoke(RING, DEFAULT)
    full = Ring(tuple(Key(f"k{number}", "x" * 22) for number in range(keyring.KEYS_MAX)))
    with pytest.raises(Refused):
        keyring.add(full, NEW)


def test_a_key_that_has_ended_goes_at_the_next_change() -> None:
    ring = Ring((OLD, Key("a", "value-of-a", until=10.0), Key("b", "value-of-b", until=20.0)))
    assert names(keyring.without_ended(ring, 10.0)) == [DEFAULT, "b"]


def test_a_mask_tells_two_apart_and_gives_nothing_away() -> None:
    value = "P5atXS814LgCgPDd3sg0Mw"
    assert keyring.masked(value) == "P5at********"
    assert keyring.masked("hunter22") == "************"
    assert value not in repr(Key("a", value))


KEYS = st.builds(
    Key,
    st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
    st.from_regex(r"[!-~]{8,40}", fullmatch=True),
    st.text(max_size=30),
    st.none() | st.floats(0, keyring.LATEST),
)


@given(st.lists(KEYS, max_size=6, unique_by=lambda key: key.name))
def test_the_file_is_read_as_it_was_written(held: list[Key]) -> None:
    ring = Ring(tuple(held))
    assert keyring.parse(keyring.document(ring).encode()) == ring


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"schema": 2, "keys": []},
        {"schema": 1},
        {"schema": 1, "keys": {}},
        {"schema": 1, "keys": ["hunter22"]},
        {"schema": 1, "keys": [{"name": "a"}]},
        {"schema": 1, "keys": [{"name": "A", "key": "hunter22"}]},
        {"schema": 1, "keys": [{"name": "a", "key": "hunter2"}]},
        {"schema": 1, "keys": [{"name": "a", "key": "hunter 22"}]},
        {"schema": 1, "keys": [{"name": "a", "key": "hünter222"}]},
        {"schema": 1, "keys": [{"name": "a", "key": "hunter22", "until": "hunter22"}]},
        {"schema": 1, "keys": [{"name": "a", "key": "hunter22", "until": True}]},
        {"schema": 1, "keys": [{"name": "a", "key": "hunter22", "until": float("inf")}]},
        {"schema": 1, "keys": [{"name": "a", "key": "hunter22"}, {"name": "a", "key": "hunter33"}]},
        {"schema": 1, "keys": [{}] * (keyring.KEYS_MAX + 1)},
    ],
)
def test_a_file_that_is_none_is_refused_without_showing_a_key(document: Any) -> None:
    with pytest.raises(ValueError, match=r"schema|keys") as caught:
        keyring.parse(json.dumps(document).encode())
    assert "hunter" not in str(caught.value)
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match="JSON"):
            keyring.parse(content)


def test_credentials_have_the_documented_shape() -> None:
    assert json.loads(keyring.credentials("value")) == {"apiKey": "value"}


@pytest.mark.parametrize("until", ["1e300", "1" + "0" * 400, "NaN", "-1", "true"])
def test_an_end_that_no_clock_can_show_is_refused(until: str) -> None:
    """The service's account writes the file, and root reads it: once both ended in a traceback, the supervisor's start too."""
    with pytest.raises(ValueError, match="until is no time"):
        keyring.parse(f'{{"schema": 1, "keys": [{{"name": "a", "key": "abcdefgh", "until": {until}}}]}}'.encode())
