"""`vllmctl store gc|pin|unpin`: what stays, and what nobody needs any more."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import publishing
from tests.component.store.stores import (
    DAY_S,
    HOLD,
    Run,
    cut_off,
    holding,
    items,
)
from tests.needs import need
from vllmd.models import demo

pytestmark = pytest.mark.component


def test_surplus_goes_and_what_is_current_pinned_or_used_stays(ctl: Run, store: Path) -> None:
    versions = [publishing.publish_version(store, number, keep=9) for number in range(1, 7)]
    assert ctl("pin", "acme/Tiny", "--version", versions[0].name).returncode == 0
    with holding(HOLD, versions[1]):
        dry = ctl("gc", "--dry-run", "--keep", "2")
        assert (dry.returncode, dry.stdout.count("would remove")) == (0, 2)
        assert all(path.is_dir() for path in versions)
        result = ctl("gc", "--keep", "2")
        assert (result.returncode, result.stdout.count("Removed")) == (0, 2)
        assert f"{versions[1].name[:12]} stays: it is in use by " in result.stdout
    assert [path.is_dir() for path in versions] == [True, True, False, False, True, True]
    assert ctl("gc", "--keep", "1").stdout.count("Removed") == 2
    assert [path.is_dir() for path in versions] == [True, False, False, False, False, True]
    assert ctl("gc", "--keep", "1").stdout == "nothing to remove\n"


def test_old_downloads_and_rubbish_go_young_ones_stay(ctl: Run, store: Path) -> None:
    old, young = cut_off(store, "acme/Old", 8 * DAY_S), cut_off(store, "acme/Young", 6 * DAY_S)
    publishing.publish_version(store, 1)
    (store / ".trash").mkdir(exist_ok=True)
    (store / ".trash" / "0123").mkdir()
    (store / ".trash" / "0123" / "weights").write_bytes(b"x" * 5000)
    gone = store / ".manifests" / "gone.json"
    gone.parent.mkdir()
    gone.write_text(json.dumps({"schema": 1, "directory": str(store / "Gone")}))
    kept = gone.with_name("kept.json")
    kept.write_text(json.dumps({"schema": 1, "directory": str(store)}))
    (store / ".published" / "bare.0123456789ab").mkdir()
    result = ctl("gc")
    assert result.returncode == 0, result.stderr
    assert "the download of acme-Old." in result.stdout
    assert "an interrupted removal left: 5.0 kB freed" in result.stdout
    assert (old.exists(), young.exists(), gone.exists(), kept.exists()) == (False, True, False, True)
    assert list((store / ".trash").iterdir()) == []
    assert len(list((store / ".published").iterdir())) == 1
    assert ctl("gc").stdout == "nothing to remove\n"


def test_one_thing_that_cannot_be_removed_does_not_keep_the_others(ctl: Run, store: Path) -> None:
    versions = [publishing.publish_version(store, number, keep=9) for number in (1, 2)]
    stuck = store / ".trash" / "0000"
    stuck.mkdir(parents=True)
    subprocess.run(["chattr", "+i", stuck], check=False, capture_output=True)
    try:
        need("i" in subprocess.run(["lsattr", "-d", stuck], check=False, capture_output=True, text=True).stdout.partition(" ")[0], "chattr +i")
        result = ctl("gc", "--keep", "1")
        assert result.returncode == 77
        assert str(stuck) in result.stderr
        assert [path.is_dir() for path in versions] == [False, True]
    finally:
        subprocess.run(["chattr", "-i", stuck], check=False, capture_output=True)


def test_keep_is_a_number_of_at_least_one(ctl: Run, store: Path) -> None:
    publishing.publish_version(store, 1)
    for value in ("0", "-1", "many"):
        assert ctl("gc", "--keep", value).returncode == 64
    assert len(items(ctl)) == 1


def test_pins_outlive_publications_until_they_are_taken_back(ctl: Run, store: Path) -> None:
    first = publishing.publish_version(store, 1)
    assert ctl("pin", "acme/Tiny").stdout == f"acme/Tiny, version {first.name[:12]} is pinned\n"
    for number in range(2, 6):
        publishing.publish_version(store, number)
    assert first.is_dir()
    assert "already" in ctl("pin", "acme/Tiny", "--version", first.name[:12]).stdout
    assert ctl("unpin", "acme/Tiny").stdout == f"acme/Tiny, version {first.name[:12]} is no longer pinned\n"
    assert ctl("unpin", "acme/Tiny").returncode == 66
    publishing.publish_version(store, 6)
    assert not first.exists()


def test_what_is_not_published_cannot_be_pinned(ctl: Run, store: Path) -> None:
    demo.make(store / "Mine")
    assert ctl("pin", "Mine").returncode == 64
    assert ctl("pin", "Nothing").returncode == 66
