"""Publishing: what lies where afterwards, what is kept, what is shared, and what stays as it was when it cannot be done."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import publishing, tiny_models
from tests.needs import need
from vllmd.config.settings import Model
from vllmd.errors import ConfigError, ModelNotFound, StorageFailed
from vllmd.models import contents as manifests
from vllmd.models import demo, links, provenance, publish, retention
from vllmd.models.identity import hash12, label
from vllmd.models.published import directories, mark_of
from vllmd.models.remote import Listing, RemoteFile
from vllmd.models.resolve import resolve
from vllmd.models.store import hold

pytestmark = pytest.mark.component

Published = Callable[..., Path]


def nothing(_: object) -> None:
    pass


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def published(tmp_path: Path, told: list[str]) -> Published:
    """Publishes version NUMBER of acme/Tiny."""
    return lambda number, **more: publishing.publish_version(tmp_path, number, tell=told.append, **more)


@pytest.fixture(autouse=True)
def whole(tmp_path: Path) -> Iterator[None]:
    yield
    marked = list((tmp_path / ".published").glob("*/*.damaged"))
    assert marked or publishing.wrong(tmp_path, tiny_models.request(tmp_path)) == []


def names(store: Path) -> set[str]:
    return {path.name for path in directories(store)}


def listing(number: int, origin: str = publishing.ORIGIN, *, sums: bool = False, pins: bool = True) -> Listing:
    """What a source would list of version NUMBER."""
    entries = publishing.described(tiny_models.request(Path("/none")), publishing.content(number)).files.items()
    files = [RemoteFile(name, entry.size, entry.pin if pins else "", {"sha256": entry.sha256} if sums else {}) for name, entry in entries]
    return Listing(tuple(files), origin)


def test_published_model_is_found_by_every_name_with_nothing_left_over(tmp_path: Path, published: Published) -> None:
    asked = tiny_models.request(tmp_path)
    directory = published(1)
    for name in (label(asked), f"Tiny.{hash12(asked.identity)}", "Tiny"):
        assert (tmp_path / name).is_symlink()
        assert not (tmp_path / name).readlink().is_absolute()
        assert (tmp_path / name).resolve() == directory
    model = resolve(asked, Model(), {}, nothing)
    assert (model.directory, model.via, model.manifest_sha256) == (directory, "local", directory.name)
    assert (publishing.wrong(tmp_path, asked), publishing.half(tmp_path)) == ([], [])
    assert publish.current(tmp_path, asked) == (directory, manifests.read(directory))


def test_existing_tools_take_it_for_theirs(tmp_path: Path, published: Published) -> None:
    directory = published(1)
    assert (directory / ".complete").exists()
    found = provenance.read(directory)
    assert found is not None
    assert provenance.mismatch(found, tiny_models.request(tmp_path)) == ""
    assert found.keys() >= {"schema", "complete", "model", "model_id", "model_identity", "identity_hash", "resolved_via", "detail", "created_at"}


def test_modes_let_nobody_write_into_shared_files_and_the_service_remove_them(published: Published) -> None:
    directory = published(1)
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (directory, *directory.rglob("*"))}
    assert modes["model.safetensors"] == modes["notes.txt"] == 0o444
    assert modes["sub"] == modes[directory.name] == 0o755
    assert modes[".complete"] == 0o644  # locked for writing on shared storage


def test_next_version_takes_the_links_and_the_first_stays(tmp_path: Path, published: Published) -> None:
    first, second = published(1), published(2)
    for name in (label(tiny_models.request(tmp_path)), "Tiny"):
        assert (tmp_path / name).resolve() == second
    assert names(tmp_path) == {first.name, second.name}


def test_name_that_is_taken_is_left_alone(tmp_path: Path, published: Published) -> None:
    demo.make(tmp_path / "Tiny")
    before = tiny_models.tree(tmp_path / "Tiny")
    directory = published(1)
    assert tiny_models.tree(tmp_path / "Tiny") == before
    assert resolve(tiny_models.request(tmp_path), Model(), {}, nothing).directory == directory


def test_name_goes_to_the_model_that_had_it_first(tmp_path: Path, published: Published) -> None:
    other = published(1, asked=tiny_models.request(tmp_path, "other/Tiny"))
    mine = published(2)
    assert (tmp_path / "Tiny").resolve() == other
    assert resolve(tiny_models.request(tmp_path), Model(), {}, nothing).directory == mine
    assert isinstance(retention.remove_version(tmp_path, other), retention.Removed)
    assert not os.path.lexists(tmp_path / "Tiny")
    third = published(3)
    assert (tmp_path / "Tiny").resolve() == third


def test_name_whose_model_is_gone_is_free(tmp_path: Path, published: Published) -> None:
    (tmp_path / "Tiny").symlink_to(f".published/other-Tiny.0123456789ab/{'ab' * 32}")
    directory = published(1)
    assert (tmp_path / "Tiny").resolve() == directory


@pytest.mark.parametrize("target", ["/etc", "..", "elsewhere"])
def test_name_that_is_a_link_of_somebody_else_is_left_alone(tmp_path: Path, published: Published, target: str) -> None:
    (tmp_path / "Tiny").symlink_to(target)
    published(1)
    assert str((tmp_path / "Tiny").readlink()) == target


@pytest.mark.parametrize("model_id", ["acme/hub", "acme/..", "acme/.pins", "acme/.x"])
def test_name_with_a_meaning_of_its_own_gets_no_link(tmp_path: Path, published: Published, model_id: str) -> None:
    directory = published(1, asked=tiny_models.request(tmp_path, model_id))
    assert resolve(tiny_models.request(tmp_path, model_id), Model(), {}, nothing).directory == directory
    assert not (tmp_path / model_id.rpartition("/")[2]).is_symlink()


def test_directory_in_the_place_of_the_link_is_kept_aside_and_comes_back_after_a_crash(
    tmp_path: Path, published: Published, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tiny_models.request(tmp_path)
    old = tmp_path / label(asked)
    demo.make(old)
    tiny_models.write_provenance(old, asked)
    with monkeypatch.context() as patch:
        patch.setattr(links, "_replace", lambda _link, _directory: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(StorageFailed, match="Input/output error"):
            published(1)
    assert not old.exists()
    assert resolve(asked, Model(), {}, nothing).directory == old
    directory = published(1)
    assert old.resolve() == directory
    [aside] = tmp_path.glob("*.bak.*")
    assert (aside / "config.json").exists()
    assert f"it is kept as {aside.name}" in "\n".join(told)


def test_store_that_is_reached_by_a_link(tmp_path: Path, told: list[str]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "models").symlink_to("real")
    for number in range(4):
        directory = publishing.publish_version(tmp_path / "models", number, tell=told.append)
        assert directory.is_relative_to(tmp_path / "real")
    assert len(names(tmp_path / "real")) == 2
    assert publishing.wrong(tmp_path / "models", tiny_models.request(tmp_path / "models")) == []


@pytest.mark.parametrize("what", ["foreign", "missing", "short", "link", "all of it"])
def test_stage_that_was_changed_is_not_published(tmp_path: Path, published: Published, what: str) -> None:
    published(1)
    asked = tiny_models.request(tmp_path)
    files = publishing.content(2)
    staged = publishing.stage(tmp_path, asked, files)
    config = staged / "config.json"
    if what == "foreign":
        (staged / "sub/more.bin").write_bytes(b"x")
    elif what != "all of it":
        config.unlink()
    if what == "short":
        config.write_bytes(b"{")
    elif what == "link":
        (tmp_path / "config.json").write_bytes(files["config.json"])
        config.symlink_to(tmp_path / "config.json")
    elif what == "all of it":
        staged.rename(tmp_path / "elsewhere")
        staged.symlink_to(tmp_path / "elsewhere")
    before = names(tmp_path)
    with pytest.raises(StorageFailed, match="something else changed the stage"):
        publish.publish(tmp_path, asked, staged, publishing.described(asked, files), 2, nothing)
    assert names(tmp_path) == before


def test_everything_belongs_to_the_stores_owner_when_root_publishes(tmp_path: Path, published: Published) -> None:
    need(os.geteuid() == 0, "root, to make a store of another user")
    os.chown(tmp_path, 12345, 12346)
    directory = published(1)
    retention.remove_version(tmp_path, published(2))
    publish.mark_damaged(directory, ["config.json"])
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in tmp_path.rglob("*") if ".staging" not in path.parts}
    assert owners == {(12345, 12346)}


# what is listed, and what is there already


@pytest.mark.parametrize("sums", [True, False])
def test_files_of_other_versions_are_used_again(tmp_path: Path, published: Published, sums: bool) -> None:
    published(1, asked=tiny_models.request(tmp_path, "other/Big"))
    found = publish.reusable(tmp_path, listing(2, sums=sums))
    assert found.keys() == {"config.json", "tokenizer.json", "LICENSE"}
    for name, (path, entry) in found.items():
        assert (path.name, path.stat().st_size) == (name, entry.size)


def test_pins_of_another_origin_say_nothing(tmp_path: Path, published: Published) -> None:
    published(1)
    assert publish.reusable(tmp_path, listing(1, "s3://elsewhere/x")) == {}
    assert publish.reusable(tmp_path, listing(1, pins=False)) == {}
    assert len(publish.reusable(tmp_path, listing(1, "s3://elsewhere/x", sums=True))) == 5


def test_files_that_are_wrong_are_not_used_again(tmp_path: Path, published: Published) -> None:
    directory = published(1)
    publish.mark_damaged(directory, ["LICENSE"])
    (directory / "config.json").unlink()
    (directory / "tokenizer.json").chmod(0o644)
    (directory / "tokenizer.json").write_bytes(b"longer")
    assert publish.reusable(tmp_path, listing(1)).keys() == {"model.safetensors", "sub/notes.txt"}


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b"[" * 100_000])
def test_manifest_that_is_damaged_is_none(tmp_path: Path, published: Published, told: list[str], content: bytes) -> None:
    directory = published(1)
    (directory / manifests.FILE).write_bytes(content)
    assert publish.current(tmp_path, tiny_models.request(tmp_path)) is None
    assert publish.reusable(tmp_path, listing(1)) == {}
    # judged like any directory: state of our own never stops a start
    assert resolve(tiny_models.request(tmp_path), Model(), {}, nothing).directory == directory
    assert published(1) == directory
    assert publish.current(tmp_path, tiny_models.request(tmp_path)) is not None


def test_manifest_of_another_version_is_none(tmp_path: Path, published: Published) -> None:
    first, second = published(1), published(2)
    (second / manifests.FILE).write_bytes((first / manifests.FILE).read_bytes())
    assert publish.current(tmp_path, tiny_models.request(tmp_path)) is None
    assert published(2) == second


@pytest.mark.parametrize("damage", ["marked", "missing", "short", "foreign", "link", "unreadable mark"])
def test_damaged_version_is_not_offered_until_it_is_published_again(tmp_path: Path, published: Published, damage: str) -> None:
    directory = published(1)
    weights = directory / "model.safetensors"
    good = weights.read_bytes()
    expected = "was found damaged" if "mark" in damage else "does not name" if damage == "foreign" else "lacks what its manifest names"
    match damage:
        case "marked":
            publish.mark_damaged(directory, ["model.safetensors"])
        case "unreadable mark":
            mark_of(directory).write_text("{")
        case "missing":
            weights.unlink()
        case "short":
            weights.unlink()
            weights.write_bytes(good[:-1])
        case "foreign":
            (directory / "sub/extra.safetensors").write_bytes(good)
        case "link":
            weights.rename(tmp_path / "elsewhere")
            weights.symlink_to(tmp_path / "elsewhere")
    asked = tiny_models.request(tmp_path)
    assert publish.current(tmp_path, asked) is None
    with pytest.raises(ModelNotFound, match=expected):
        resolve(asked, Model(), {}, nothing)
    assert published(1) == directory
    assert publish.damaged(directory) == frozenset()
    assert resolve(asked, Model(), {}, nothing).directory == directory
    assert not weights.is_symlink()
    assert weights.read_bytes() == good
    assert (publishing.wrong(tmp_path, asked), publishing.half(tmp_path)) == ([], [])


def test_mark_says_which_files_and_grows(tmp_path: Path, published: Published) -> None:
    directory = published(1)
    publish.mark_damaged(directory, [])
    assert publish.damaged(directory) == frozenset()
    publish.mark_damaged(directory, ["LICENSE"])
    publish.mark_damaged(directory, iter(["config.json"]))
    assert publish.damaged(directory) == {"LICENSE", "config.json"}
    assert json.loads(mark_of(directory).read_text()) == ["LICENSE", "config.json"]


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "number", "nested", "giant"])
def test_mark_that_cannot_be_understood_speaks_for_all(published: Published, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = published(1)
    mark = mark_of(directory)
    match kind:
        case "link":
            mark.symlink_to("/dev/zero")
        case "fifo":
            os.mkfifo(mark)
        case "directory":
            mark.mkdir()
        case "giant":
            monkeypatch.setattr("vllmd.models.published.MARK_LIMIT_BYTES", 10)
            mark.write_text(json.dumps(["config.json"]))
        case _:
            mark.write_text({"number": "[1]", "nested": "[" * 100_000}[kind])
    assert publish.damaged(directory) == {"config.json", "tokenizer.json", "LICENSE", "model.safetensors", "sub/notes.txt"}


def test_directory_in_the_place_of_a_mark_does_not_stop_the_repair(published: Published) -> None:
    directory = published(1)
    mark = mark_of(directory)
    (mark / "x").mkdir(parents=True)
    publish.mark_damaged(directory, ["LICENSE"])
    assert mark.is_file()
    mark.unlink()
    mark.mkdir()
    assert published(1) == directory
    assert not mark.exists()
    assert publish.damaged(directory) == frozenset()


@pytest.mark.parametrize(("source", "is_refused"), [("hf-hub", True), ("hf-cache", True), ("r2", False)])
def test_policy_for_revisions_holds_for_what_a_hub_gave_before_it(tmp_path: Path, published: Published, monkeypatch: pytest.MonkeyPatch, source: str, is_refused: bool) -> None:
    described = publishing.described
    monkeypatch.setattr(publishing, "described", lambda *args, **more: replace(described(*args, **more), source=source))
    directory = published(1)
    asked, policy = tiny_models.request(tmp_path, sources=("local",)), Model(require_revision="commit")
    assert resolve(asked, Model(), {}, nothing).directory == directory
    if is_refused:
        with pytest.raises(ConfigError, match="require_revision"):
            resolve(asked, policy, {}, nothing)
    else:
        assert resolve(asked, policy, {}, nothing).directory == directory


def test_version_that_became_a_link_is_made_anew_where_it_belongs(tmp_path: Path, published: Published) -> None:
    directory = published(1)
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    before = tiny_models.tree(tmp_path / "elsewhere")
    assert publish.current(tmp_path, tiny_models.request(tmp_path)) is None
    assert published(1) == directory
    assert not directory.is_symlink()
    assert tiny_models.tree(tmp_path / "elsewhere") == before


def test_mark_is_for_published_versions_only(tmp_path: Path) -> None:
    directory = demo.make(tmp_path / "Tiny")
    before = tiny_models.tree(tmp_path)
    publish.mark_damaged(directory, ["config.json"])
    assert publish.damaged(directory) == frozenset()
    assert tiny_models.tree(tmp_path) == before


def test_damage_is_marked_in_every_version_that_shares_the_file(tmp_path: Path, published: Published) -> None:
    first = published(1)
    asked = tiny_models.request(tmp_path)
    files = publishing.content(2)
    staged = publishing.stage(tmp_path, asked, files)
    for name in ("LICENSE", "config.json"):
        (staged / name).unlink()
        (staged / name).hardlink_to(first / name)
    second = publish.publish(tmp_path, asked, staged, publishing.described(asked, files), 2, nothing)
    assert (first / "LICENSE").samefile(second / "LICENSE")
    publish.mark_damaged(first, ["LICENSE"])
    assert publish.damaged(second) == {"LICENSE"}


def test_stage_that_took_the_damaged_file_itself_is_refused(tmp_path: Path, published: Published) -> None:
    directory = published(1)
    asked = tiny_models.request(tmp_path)
    files = publishing.content(1)
    staged = publishing.stage(tmp_path, asked, files)
    (staged / "LICENSE").unlink()
    (staged / "LICENSE").hardlink_to(directory / "LICENSE")
    publish.mark_damaged(directory, ["LICENSE"])
    with pytest.raises(StorageFailed, match="the very file that was found damaged"):
        publish.publish(tmp_path, asked, staged, publishing.described(asked, files), 2, nothing)
    assert not (staged / "LICENSE").exists()
    assert publish.damaged(directory) == {"LICENSE"}


def test_who_reads_a_damaged_version_keeps_it_while_it_is_mended(published: Published) -> None:
    directory = published(1)
    with hold(directory) as held, open(directory / "model.safetensors", "rb") as reader:
        good = reader.read()
        publish.mark_damaged(directory, ["model.safetensors"])
        assert published(1) == directory
        assert os.fstat(reader.fileno()).st_nlink == 0
        reader.seek(0)
        assert reader.read() == good
        held.close()


def test_content_that_comes_back_after_its_removal_is_not_damaged(tmp_path: Path, published: Published) -> None:
    directory = published(1)
    mark_of(directory).write_text('["LICENSE"]')
    os.rename(directory, tmp_path / "away")  # noqa: PTH104 - a removal that was killed before it took the mark away
    assert published(1) == directory
    assert publish.damaged(directory) == frozenset()
