"""Which published versions stay, how others go, and what nobody went on with."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import publishing, tiny_models
from vllmd.errors import TryLater
from vllmd.models import demo, leftovers, publish, retention, store
from vllmd.models.identity import hash12, label
from vllmd.models.lock import locked
from vllmd.models.published import directories
from vllmd.models.store import hold

pytestmark = pytest.mark.component

Published = Callable[..., Path]


def nothing(_: object) -> None:
    pass


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def published(tmp_path: Path, told: list[str]) -> Iterator[Published]:
    """Publishes version NUMBER of acme/Tiny."""
    yield lambda number, **more: publishing.publish_version(tmp_path, number, tell=told.append, **more)
    assert publishing.wrong(tmp_path, tiny_models.request(tmp_path)) == []


def names(store: Path) -> set[str]:
    return {path.name for path in directories(store)}


def test_as_many_versions_stay_as_asked(tmp_path: Path, published: Published, told: list[str]) -> None:
    versions = [published(number, keep=3) for number in range(5)]
    assert names(tmp_path) == {path.name for path in versions[2:]}
    assert f"removed {versions[1]}" in told
    assert names(tmp_path) == {path.name for path in versions[2:]}
    last = published(5, keep=1)
    assert names(tmp_path) == {last.name}


def test_clock_that_was_set_back_takes_no_version_away_that_was_just_served(tmp_path: Path, published: Published) -> None:
    published(1, created_at="2031-01-01T00:00:00Z")
    second = published(2, created_at="2030-01-01T00:00:00Z")
    third = published(3, created_at="2020-01-01T00:00:00Z")
    os.utime(second, (0, 0))
    assert names(tmp_path) == {second.name, third.name}
    fourth = published(4, created_at="2019-01-01T00:00:00Z")
    assert names(tmp_path) == {third.name, fourth.name}


def test_version_that_comes_back_is_the_newest(tmp_path: Path, published: Published) -> None:
    first = published(1)
    second = published(2)
    assert published(1) == first
    third = published(3)
    assert names(tmp_path) == {first.name, third.name}
    assert second.name not in names(tmp_path)


def test_version_in_use_stays_until_it_is_not(tmp_path: Path, published: Published, told: list[str]) -> None:
    first = published(1, keep=1)
    with hold(first):
        published(2, keep=1)
        assert f"{first} stays: it is in use" in told
        assert first.name in names(tmp_path)
        result = retention.remove_version(tmp_path, first)
        assert result == retention.InUse(first, "is in use")
    published(3, keep=1)
    assert first.name not in names(tmp_path)


def test_version_in_use_on_another_host_stays(tmp_path: Path, published: Published) -> None:
    """On shared storage only the lock on the file is seen, not the one on the directory."""
    first = published(1, keep=1)
    with open(first / ".complete", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        published(2, keep=1)
        assert first.name in names(tmp_path)
    with hold(first), open(first / ".complete", "rb+") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_pinned_version_and_one_that_a_link_leads_to_stay(tmp_path: Path, published: Published) -> None:
    first, second = published(1, keep=9), published(2, keep=9)
    (tmp_path / ".pins").mkdir()
    (tmp_path / ".pins" / first.name).touch()
    (tmp_path / "stable").symlink_to(os.path.relpath(second, tmp_path))
    third = published(3, keep=1)
    assert names(tmp_path) == {first.name, second.name, third.name}


def test_other_models_versions_are_not_counted(tmp_path: Path, published: Published) -> None:
    other = published(1, asked=tiny_models.request(tmp_path, "other/Tiny"))
    mine = published(2, keep=1)
    assert names(tmp_path) == {other.name, mine.name}


def test_removed_version_leaves_neither_links_nor_half_of_it(tmp_path: Path, published: Published) -> None:
    directory = published(1)
    publish.mark_damaged(directory, ["LICENSE"])
    result = retention.remove_version(tmp_path, directory)
    assert isinstance(result, retention.Removed)
    assert result.bytes > 4096
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if ".locks" not in path.parts and ".staging" not in path.parts}
    assert left == {".published", ".trash"}


def test_shared_files_are_not_counted_as_freed(tmp_path: Path, published: Published) -> None:
    directory = published(1)
    (tmp_path / "other").hardlink_to(directory / "model.safetensors")
    result = retention.remove_version(tmp_path, directory)
    assert isinstance(result, retention.Removed)
    assert result.bytes < 4096
    assert (tmp_path / "other").stat().st_size > 4096


@pytest.mark.parametrize("where", ["Tiny", ".published", ".published/x", "../x/.published/y/" + "ab" * 32])
def test_nothing_but_published_versions_can_be_removed(tmp_path: Path, published: Published, where: str) -> None:
    published(1)
    with pytest.raises(ValueError, match="is no published version"):
        retention.remove_version(tmp_path, tmp_path / where)


def test_version_whose_model_is_being_resolved_is_not_removed(tmp_path: Path, published: Published) -> None:
    directory = published(1)
    with locked(tmp_path, hash12("acme/Tiny"), 0, nothing):
        result = retention.remove_version(tmp_path, directory)
    assert isinstance(result, retention.InUse)
    assert f"is being worked on: {tmp_path}/.locks/" in result.reason
    assert f"pid {os.getpid()}" in result.reason


def test_trash_that_a_kill_left_is_gone_after_the_next_publication(tmp_path: Path, published: Published) -> None:
    (tmp_path / ".trash/0123/sub").mkdir(parents=True)
    (tmp_path / ".trash/0123/sub/file").write_text("x")
    published(1)
    assert list((tmp_path / ".trash").iterdir()) == []


def test_who_waits_for_a_version_that_is_removed_learns_it(published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the open and the lock of `hold` the version goes."""
    directory = published(1)
    outcome: list[BaseException] = []
    opened, removed = threading.Event(), threading.Event()
    share = store._share

    def late(fd: int, path: Path, deadline: float) -> None:
        opened.set()
        assert removed.wait(20)
        share(fd, path, deadline)

    def holding() -> None:
        with pytest.raises(TryLater, match="was removed or replaced meanwhile") as caught:
            hold(directory)
        outcome.append(caught.value)

    monkeypatch.setattr(store, "_share", late)
    thread = threading.Thread(target=holding)
    thread.start()
    assert opened.wait(20)
    assert isinstance(retention.remove_version(tmp_path, directory), retention.Removed)
    removed.set()
    thread.join()
    assert len(outcome) == 1
    with pytest.raises(TryLater, match="was removed or replaced"):
        hold(directory)


def test_hold_notes_the_last_use_of_versions_and_of_nothing_else(tmp_path: Path, published: Published) -> None:
    directory, own = published(1), demo.make(tmp_path / "Own")
    for path in (directory, own):
        os.utime(path, (1, 1))
        hold(path).close()
    assert directory.stat().st_mtime > 1_000_000
    assert own.stat().st_mtime == 1


def test_stale_stages_go_unless_somebody_works_on_them(tmp_path: Path) -> None:
    asked = tiny_models.request(tmp_path)
    staged = publishing.stage(tmp_path, asked, publishing.content(1)).parent
    staged.with_name(f"{staged.name}.log").write_text("failed\n")
    (tmp_path / ".staging/README").write_text("not ours")
    assert leftovers.stale_stages(tmp_path) == []
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    [stale] = leftovers.stale_stages(tmp_path)
    assert (stale.label, len(stale.paths)) == (label(asked), 2)
    assert stale.bytes > 4096
    with locked(tmp_path, hash12(asked.identity), 0, nothing):
        assert isinstance(leftovers.remove_stage(tmp_path, stale), retention.InUse)
    assert isinstance(leftovers.remove_stage(tmp_path, stale), retention.Removed)
    assert [path.name for path in (tmp_path / ".staging").iterdir()] == ["README"]
    assert list((tmp_path / ".trash").iterdir()) == []


def test_stage_written_in_the_future_is_not_stale(tmp_path: Path) -> None:
    staged = publishing.stage(tmp_path, tiny_models.request(tmp_path), publishing.content(1))
    os.utime(staged / "config.json", (2**33, 2**33))
    assert leftovers.stale_stages(tmp_path, 0) == []
