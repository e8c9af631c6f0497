"""The search finds a secret in every spelling, and nothing excuses a file that all may read."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.secret_search import WORLD, Allowed, files, plant, search

pytestmark = pytest.mark.unit

PLANTED = plant("key")
KEY = PLANTED["key"]
WRITTEN = [
    KEY,
    json.dumps({"Authorization": f"Bearer {KEY}"}),
    f"https://host/?token={quote(KEY, safe='')}",
    *(base64.b64encode(f"{'u' * count}:{KEY}:".encode()).decode() for count in range(3)),
    base64.urlsafe_b64encode(KEY.encode()).decode(),
    KEY.encode().hex(),
]


@pytest.mark.parametrize("text", WRITTEN, ids=range(len(WRITTEN)))
def test_every_spelling_is_found(text: str) -> None:
    assert search(PLANTED, [("somewhere", f"before {text} after".encode())]) == ["key in somewhere"]


def test_another_secret_is_not_taken_for_it() -> None:
    assert search(PLANTED, [("somewhere", plant("key")["key"].encode())]) == []


def test_an_allowed_place_is_excused_unless_all_may_read_it(tmp_path: Path) -> None:
    place = tmp_path / "key"
    place.write_text(KEY)
    place.chmod(0o600)
    allowed = [Allowed(f"{tmp_path}/*", "a test")]
    assert search(PLANTED, files([tmp_path]), allowed) == []
    assert search(PLANTED, files([tmp_path])) == [f"key in {place}"]
    place.chmod(0o644)
    assert search(PLANTED, files([tmp_path], root=str(tmp_path)), [Allowed("/*", "a test")]) == [f"key in {WORLD}/key"]


def test_names_and_links_are_places_too(tmp_path: Path) -> None:
    hidden = plant("key")["key"].replace("/", "-")
    (tmp_path / hidden).mkdir()
    (tmp_path / "link").symlink_to(hidden)
    assert len(search({"key": hidden}, files([tmp_path]))) == 2
