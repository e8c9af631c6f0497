"""`vllmctl store rm`: what goes, and what never."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests import publishing, tiny_models
from tests.component.store.stores import (
    COMMIT,
    HOLD,
    Run,
    cut_off,
    holding,
    instance,
    items,
    program,
)
from vllmd.config.paths import Paths
from vllmd.models import catalog, demo, discard
from vllmd.models.identity import label
from vllmd.models.retention import InUse, Removed

pytestmark = pytest.mark.component


def test_model_is_removed_with_all_its_versions_and_names(ctl: Run, store: Path) -> None:
    for number in (1, 2):
        publishing.publish_version(store, number)
    result = ctl("rm", "acme/Tiny", "--yes")
    assert (result.returncode, result.stdout.count("Removed acme/Tiny, version ")) == (0, 2)
    assert "kB freed" in result.stdout
    assert items(ctl) == []
    assert [path.name for path in store.iterdir() if not path.name.startswith(".")] == []
    assert list((store / ".published").iterdir()) == list((store / ".trash").iterdir()) == []


def test_one_version_is_removed(ctl: Run, store: Path) -> None:
    one, two = publishing.publish_version(store, 1), publishing.publish_version(store, 2)
    assert ctl("rm", "acme/Tiny", "--version", one.name[:12], "--yes").returncode == 0
    assert [item["version"] for item in items(ctl)] == [two.name]
    assert ctl("rm", "acme/Tiny", "--version", one.name[:12], "--yes").returncode == 66
    assert ctl("rm", "acme/Tiny", "--version", "../..", "--yes").returncode == 64


def test_hub_cache_is_removed_by_its_id_or_directory(ctl: Run, store: Path) -> None:
    for name, called in (("org/One", "org/One"), ("org/Two", "models--org--Two")):
        snapshot = tiny_models.snapshot(store / "hub", name, COMMIT, main=True)
        size = sum(path.stat().st_size for path in snapshot.parents[1].rglob("*") if path.is_file() and not path.is_symlink())
        result = ctl("rm", called, "--yes")
        assert (result.returncode, result.stderr) == (0, "")
        assert f"Removed {name} in the hub cache: {size / 1e3:.1f} kB freed" in result.stdout
    assert list((store / "hub").iterdir()) == list((store / ".trash").iterdir()) == []


def test_freed_is_what_no_other_version_has(ctl: Run, store: Path) -> None:
    one, two = publishing.publish_version(store, 1, size=1_000_000), publishing.publish_version(store, 2)
    (two / "copy").hardlink_to(one / "model.safetensors")
    result = ctl("rm", "acme/Tiny", "--version", one.name, "--yes")
    freed = float(result.stdout.partition(": ")[2].split()[0])
    assert " kB freed" in result.stdout
    assert freed < 10


@pytest.mark.parametrize(
    "name",
    ["../victim", "hub/../../victim", "/etc", "*", "", ".", "..", "hub", ".published", ".staging/../../victim", "acme/Tin?", "acme/Tiny/", "ACME/TINY", "-"],
)
def test_only_what_the_list_shows_can_be_removed(ctl: Run, store: Path, name: str) -> None:
    """A delete command of another tool put the name into a path of rm -rf, and `../x` went."""
    victim = store.parent / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    publishing.publish_version(store, 1)
    tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    before = tiny_models.tree(store.parent)
    result = ctl("rm", "--yes", "--", name)
    assert result.returncode == 66, result.stderr
    assert "is not in the store" in result.stderr
    assert "vllmctl store list shows what is" in result.stderr
    assert tiny_models.tree(store.parent) == before


def test_own_directory_is_never_removed(ctl: Run, store: Path, tmp_path: Path) -> None:
    demo.make(store / "Mine")
    (store / "Elsewhere").symlink_to(demo.make(tmp_path / "elsewhere"))
    before = tiny_models.tree(tmp_path)
    for name in ("Mine", "Elsewhere"):
        result = ctl("rm", name, "--yes", "--force")
        assert result.returncode == 64
        assert "is a directory of your own" in result.stderr
    assert tiny_models.tree(tmp_path) == before


def test_what_is_in_use_stays_and_it_is_said_by_whom(ctl: Run, paths: Paths, store: Path) -> None:
    one, two = publishing.publish_version(store, 1), publishing.publish_version(store, 2)
    with instance(paths, "demo", one, holds=True):
        result = ctl("rm", "acme/Tiny", "--yes", "--force")
        assert result.returncode == 75
        assert f"version {one.name[:12]} is in use by demo" in result.stderr
        assert "vllmctl stop demo" in result.stderr
        assert two.is_dir(), "all or nothing"
    assert ctl("rm", "acme/Tiny", "--yes").returncode == 0


def test_snapshot_in_use_keeps_its_hub_cache(ctl: Run, store: Path) -> None:
    snapshot = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    with holding(HOLD, snapshot) as other:
        result = ctl("rm", "org/Cached", "--yes")
        assert result.returncode == 75
        assert f"(pid {other.pid})" in result.stderr
    assert snapshot.is_dir()


def test_snapshot_that_is_taken_into_use_after_the_look_stays(store: Path) -> None:
    snapshot = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    [item] = catalog.take(store).items
    with holding(HOLD, snapshot):
        assert isinstance(discard.remove_hub(store, item), InUse)
    assert snapshot.is_dir()
    assert isinstance(discard.remove_hub(store, item), Removed)


def test_download_that_runs_is_not_removed(ctl: Run, store: Path) -> None:
    directory = cut_off(store)
    lock = "from vllmd.models.lock import locked\nlock = locked(Path(sys.argv[1]), sys.argv[2], 0, print)\nlock.__enter__()"
    hashed = label(tiny_models.request(store, "acme/Cut")).rpartition(".")[2]
    with holding(lock, store, hashed) as other:
        assert f"(pid {other.pid})" in items(ctl)[0]["used_by"][0]
        assert ctl("rm", "acme/Cut", "--yes").returncode == 75
        assert "nothing to remove" in ctl("gc").stdout
        assert directory.is_dir()
    assert ctl("rm", "acme/Cut", "--yes").returncode == 0
    assert list((store / ".staging").iterdir()) == []


def test_pinned_version_goes_by_force_only(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    assert ctl("pin", "acme/Tiny").returncode == 0
    refused = ctl("rm", "acme/Tiny", "--yes")
    assert (refused.returncode, directory.is_dir()) == (64, True)
    assert "is pinned" in refused.stderr
    assert f"vllmctl store unpin acme/Tiny --version {directory.name[:12]}" in refused.stderr
    assert ctl("rm", "acme/Tiny", "--yes", "--force").returncode == 0
    assert list((store / ".pins").iterdir()) == []


def test_nobody_to_ask_removes_nothing(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    result = ctl("rm", "acme/Tiny")
    assert (result.returncode, directory.is_dir()) == (64, True)
    assert "--yes" in result.stderr


@pytest.mark.parametrize(("answer", "stays"), [(b"y\n", False), (b"n\n", True), (b"\n", True), (b"\x04", True)])
def test_person_at_a_terminal_is_asked(paths: Paths, store: Path, answer: bytes, stays: bool) -> None:
    directory = publishing.publish_version(store, 1)
    master, slave = pty.openpty()
    try:
        os.write(master, answer)
        result = subprocess.run(program(paths, "rm", "acme/Tiny"), stdin=slave, capture_output=True, text=True, check=False, timeout=60)
    finally:
        os.close(master)
        os.close(slave)
    assert (result.returncode, directory.is_dir()) == (0, stays)
    assert f"acme/Tiny, version {directory.name[:12]}: " in result.stderr
    assert "Remove? [y/N]" in result.stderr
