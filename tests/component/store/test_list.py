"""`vllmctl store list`: what is there, and who uses it: real directories and locks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import procs, publishing, tiny_models
from tests.component.store.stores import (
    COMMIT,
    HOLD,
    Run,
    as_nobody,
    cut_off,
    holding,
    instance,
    items,
    let_in,
    listed,
    program,
)
from tests.needs import need
from vllmd.config.paths import Paths
from vllmd.models import demo
from vllmd.models.inuse import Flocks
from vllmd.models.published import mark_damaged

pytestmark = pytest.mark.component


def test_store_that_is_not_there_or_empty_says_what_to_do(ctl: Run, paths: Paths) -> None:
    absent = ctl("list")
    assert (absent.returncode, absent.stderr) == (0, "")
    assert "does not exist yet" in absent.stdout
    paths.models.mkdir(parents=True)
    assert "holds no models; `vllmd resolve NAME`" in ctl("list").stdout
    assert items(ctl) == []


def test_each_kind_is_listed_with_what_it_is(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    publishing.publish_version(store, 2, asked=tiny_models.request(store, revision="v1"))
    tiny_models.snapshot(store / "hub", "org/Cached", COMMIT, main=True)
    demo.make(store / "Mine")
    cut_off(store)
    found = {item["identity"]: item for item in items(ctl)}
    assert {name: item["kind"] for name, item in found.items()} == {
        "acme/Tiny": "published",
        "acme/Tiny@v1": "published",
        "org/Cached": "hub-cache",
        "Mine": "local",
        "acme/Cut": "unfinished",
    }
    tiny = found["acme/Tiny"]
    assert (tiny["version"], tiny["current"], tiny["directory"]) == (directory.name, True, str(directory))
    assert tiny["bytes"] == sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    assert found["org/Cached"]["revision"] == COMMIT
    text = ctl("list").stdout
    assert "acme/Tiny     published" in text
    assert directory.name[:12] in text
    assert COMMIT[:12] in text
    assert COMMIT not in text
    assert "5 entries, " in text


def test_columns_are_aligned(ctl: Run, store: Path) -> None:
    publishing.publish_version(store, 1)
    demo.make(store / "A-name-that-is-longer-than-the-others-in-the-list")
    lines = ctl("list").stdout.splitlines()[:3]
    assert len({line.index(word) for line, word in zip(lines, ("KIND", "local", "published"), strict=True)}) == 1


def test_files_of_a_hub_cache_are_counted_once_and_links_not_at_all(ctl: Run, store: Path) -> None:
    """Every snapshot links to the same blobs: naive sums say a multiple."""
    first = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    second = first.with_name("d" * 40)
    second.mkdir()
    for link in first.iterdir():
        (second / link.name).symlink_to(link.readlink())
    [item] = items(ctl)
    assert item["bytes"] == sum(path.stat().st_size for path in (first.parent.parent / "blobs").iterdir())


def test_what_versions_share_is_counted_once_in_the_total(ctl: Run, store: Path) -> None:
    one = publishing.publish_version(store, 1, size=100_000)
    two = publishing.publish_version(store, 2)
    (two / "copy").hardlink_to(one / "model.safetensors")
    found = listed(ctl)
    shared = sum(path.stat().st_size for path in one.rglob("*") if path.is_file() and path.stat().st_nlink > 1)
    assert shared > 100_000
    assert [item["shared_bytes"] for item in found["items"]] == [shared, shared]
    assert found["bytes"] == sum(item["bytes"] for item in found["items"]) - shared
    assert "more if they shared no files" in ctl("list").stdout


def test_a_thousand_entries_are_listed_in_a_second(paths: Paths, store: Path) -> None:
    for number in range(1000):
        directory = store / ".published" / f"org-M{number}.{number:012x}" / f"{number:064x}"
        directory.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", ".complete", ".vllmd-manifest.json"):
            (directory / name).write_text("{}")
        (store / f"org-M{number}.{number:012x}").symlink_to(directory.relative_to(store))
    with subprocess.Popen(program(paths, "list"), stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        assert len(listing.stdout.read().splitlines()) == 1003
        _, status, usage = os.wait4(listing.pid, 0)
        listing.returncode = os.waitstatus_to_exitcode(status)
    # Of the processor: the machine may be busy. All of it takes 0.5 s on a calm one.
    assert usage.ru_utime + usage.ru_stime < 1.5


def test_users_are_instances_by_name_and_others_by_process(ctl: Run, paths: Paths, store: Path) -> None:
    first, second = publishing.publish_version(store, 1), publishing.publish_version(store, 2)
    with instance(paths, "demo", first, holds=True), holding(HOLD, second) as other:
        used = {item["version"]: item["used_by"] for item in items(ctl)}
        described = procs.read(other.pid)
        assert described is not None
        assert used[first.name] == ["demo"]
        assert used[second.name] == [f"{described.comm} (pid {other.pid})"]
        assert "used by demo" in ctl("list").stdout
    assert {tuple(item["used_by"]) for item in items(ctl)} == {()}


def test_status_of_a_supervisor_that_is_dead_is_no_user(ctl: Run, paths: Paths, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    with instance(paths, "demo", directory, holds=False):
        assert items(ctl)[0]["used_by"] == ["demo"]
    assert items(ctl)[0]["used_by"] == []


def test_user_whom_the_kernel_does_not_name_is_a_user_all_the_same(ctl: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From within a container, or of another host, only the lock itself is seen."""
    directory = publishing.publish_version(store, 1)
    snapshot = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT)
    monkeypatch.setattr(Flocks, "read", lambda: Flocks({}))
    with holding(HOLD, directory), holding(HOLD, snapshot):
        assert [item["used_by"] for item in items(ctl)] == [["another process"]] * 2
        for name in ("acme/Tiny", "org/Cached"):
            refused = ctl("rm", name, "--yes")
            assert refused.returncode == 75
            assert "in use by another process" in refused.stderr


def test_listing_bears_versions_that_come_and_go(ctl: Run, store: Path) -> None:
    program = "from tests import publishing\nstore = Path(sys.argv[1])\npublishing.publish_version(store, 0)\nprint('held', flush=True)\n"
    program += "for number in range(1, 100000): publishing.publish_version(store, number, keep=1)"
    with holding(program, store):
        for _ in range(100):
            assert len(items(ctl, "published")) <= 3


def test_listing_disturbs_nobody_and_changes_nothing(ctl: Run, store: Path) -> None:
    publishing.publish_version(store, 1)
    demo.make(store / "Mine")
    before = tiny_models.tree(store)
    ctl("list")
    assert tiny_models.tree(store) == before


def test_damage_and_pins_are_shown(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    mark_damaged(directory, ["model.safetensors"])
    assert ctl("pin", "acme/Tiny").returncode == 0
    [item] = items(ctl)
    assert (item["damaged"], item["pinned"]) == (["model.safetensors"], True)
    assert "current, pinned, DAMAGED: model.safetensors" in ctl("list").stdout


@pytest.mark.parametrize("content", [b"", b"{}", b'{"schema": 1, "files": {"../../etc/passwd": {}}}', b"[" * 10000])
def test_manifest_that_says_nonsense_is_shown_as_damage_and_its_version_can_go(ctl: Run, store: Path, content: bytes) -> None:
    directory = publishing.publish_version(store, 1)
    manifest = directory / ".vllmd-manifest.json"
    manifest.unlink()
    manifest.write_bytes(content)
    [item] = items(ctl)
    assert item["damaged"] == [".vllmd-manifest.json"]
    assert ctl("rm", item["name"], "--yes").returncode == 0
    assert items(ctl) == []


def test_other_directory_and_the_configured_one(ctl: Run, paths: Paths, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    publishing.publish_version(other, 1)
    assert items(ctl) == []
    assert "acme/Tiny" in ctl("list", "--dir", str(other)).stdout
    paths.config.mkdir(parents=True)
    (paths.config / "vllmd.yaml").write_text(f"model:\n  dir: {other}\n")
    assert [item["id"] for item in items(ctl)] == ["acme/Tiny"]


def test_store_that_may_not_be_read_is_77_with_a_way_out(paths: Paths, store: Path, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    publishing.publish_version(store, 1)
    let_in(tmp_path)
    store.chmod(0o700)
    result = as_nobody(f"vllmctl --root {paths.config.parent} store list")
    assert result.returncode == 77, result.stderr
    assert str(store) in result.stderr
    assert "sudo vllmctl store" in result.stderr
    assert "Traceback" not in result.stderr


def test_own_directory_that_may_not_be_read_hides_nothing_else(paths: Paths, store: Path, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    publishing.publish_version(store, 1)
    demo.make(store / "Secret").chmod(0o700)
    let_in(tmp_path)
    result = as_nobody(f"vllmctl --root {paths.config.parent} store list")
    assert result.returncode == 0, result.stderr
    assert "acme/Tiny" in result.stdout
    assert "not readable" in result.stdout


@pytest.mark.parametrize("arguments", [["verify", "--all", "x"], ["frob"], [], ["rm"], ["list", "x"]])
def test_wrong_command_line_is_64(ctl: Run, arguments: list[str]) -> None:
    result = ctl(*arguments)
    assert (result.returncode, result.stdout) == (64, "")
    assert len(result.stderr.splitlines()) == 2
