"""The stage: what it takes over from an earlier attempt, what it refuses, and what it shares with published versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.component.downloads import Plain, Ran, listing, noise, sha256
from tests.fakes.files_server import FilesServer
from vllmd.errors import PermissionMissing
from vllmd.models.hashing import Digest
from vllmd.models.remote import Listing, RemoteFile
from vllmd.models.stage import Stage

pytestmark = pytest.mark.component

FILES = {"config.json": b"{}", "sub/a.safetensors": noise(50_000)}


def fetched(store: Path, listed: Listing) -> Stage:
    with FilesServer(FILES) as server:
        Ran(store).fetch(listed, Plain(server.url))
    return Stage.open(store, "tiny", listed)


def test_new_stage_lacks_everything(tmp_path: Path) -> None:
    stage = Stage.open(tmp_path, "tiny", listing(FILES))
    assert stage.files == tmp_path / ".staging/tiny/files"
    assert stage.have() == {}
    assert stage.remaining_bytes(listing(FILES)) == listing(FILES).bytes


def test_what_was_fetched_is_there_with_its_sums(tmp_path: Path) -> None:
    stage = fetched(tmp_path, listing(FILES))
    assert {name: digest.sha256 for name, digest in stage.have().items()} == {name: sha256(data) for name, data in FILES.items()}
    assert stage.remaining_bytes(listing(FILES)) == 0
    stage.remove()
    assert not stage.directory.exists()


def test_file_killed_between_its_note_and_its_name_gets_its_name(tmp_path: Path) -> None:
    stage = fetched(tmp_path, listing(FILES))
    (stage.files / "config.json").rename(stage.part_path("config.json"))
    assert set(Stage.open(tmp_path, "tiny", listing(FILES)).have()) == set(FILES)
    assert (stage.files / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize("what", ["touched", "other inode", "gone", "longer"])
def test_file_that_was_changed_since_is_no_longer_had(tmp_path: Path, what: str) -> None:
    stage = fetched(tmp_path, listing(FILES))
    path = stage.files / "config.json"
    match what:
        case "touched":
            os.utime(path, ns=(1, 1))
        case "other inode":
            times = path.stat()
            (tmp_path / "new").write_bytes(b"[]")
            os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
            (tmp_path / "new").rename(path)
        case "gone":
            path.unlink()
        case "longer":
            path.write_bytes(b"{}   ")
    again = Stage.open(tmp_path, "tiny", listing(FILES))
    assert set(again.have()) == {"sub/a.safetensors"}
    assert not path.exists()


@pytest.mark.parametrize(
    "changed",
    [
        RemoteFile("config.json", 2, "other pin"),
        RemoteFile("config.json", 3, "pin-config.json"),
        RemoteFile("config.json", 2, "pin-config.json", {"sha256": "0" * 64}),
        RemoteFile("config.json", 2),
        RemoteFile("other.json", 2, "pin-config.json"),
    ],
    ids=["pin", "size", "sum", "nothing to tell versions apart", "name"],
)
def test_file_of_another_version_is_removed(tmp_path: Path, changed: RemoteFile) -> None:
    files = listing(FILES, sums=False).files
    stage = fetched(tmp_path, listing(FILES, sums=False))
    again = Stage.open(tmp_path, "tiny", Listing((changed, files[1]), "s3://bucket/tiny"))
    assert set(again.have()) == {"sub/a.safetensors"}
    assert not (stage.files / "config.json").exists()


def test_same_sum_from_elsewhere_is_the_same_file_and_same_pin_is_not(tmp_path: Path) -> None:
    for sums in (True, False):
        fetched(tmp_path, listing(FILES, sums=sums))
        moved = Listing(listing(FILES, sums=sums).files, "https://hub/other")
        assert bool(Stage.open(tmp_path, "tiny", moved).have()) is sums


def test_foreign_files_and_links_in_it_are_removed(tmp_path: Path) -> None:
    stage = fetched(tmp_path, listing(FILES))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (stage.files / "link").symlink_to(outside)
    (stage.files / "junk.bin").write_bytes(b"x")
    (stage.directory / "parts" / "junk").write_bytes(b"x")
    os.mkfifo(stage.files / "fifo")
    Stage.open(tmp_path, "tiny", listing(FILES))
    assert {str(path.relative_to(stage.files)) for path in stage.files.rglob("*")} == {"config.json", "sub", "sub/a.safetensors"}
    assert list((stage.directory / "parts").iterdir()) == []
    assert (outside / "precious").exists()


@pytest.mark.parametrize("place", [".staging", ".staging/tiny", ".staging/tiny/files", ".staging/tiny/parts"])
def test_link_in_the_place_of_a_directory_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionMissing):
        Stage.open(tmp_path, "tiny", listing(FILES))
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["../escape", "/etc/x", "a/../../x"])
def test_name_that_leaves_the_stage_is_refused(tmp_path: Path, name: str) -> None:
    stage = Stage.open(tmp_path, "tiny", listing(FILES))
    with pytest.raises(OSError, match="no name"):
        stage.final_path(name)


def test_published_file_is_taken_over_by_a_link(tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.write_bytes(FILES["sub/a.safetensors"])
    digest = Digest(sha256(FILES["sub/a.safetensors"]), "b3")
    listed = listing(FILES)
    stage = Stage.open(tmp_path, "tiny", listed)
    assert stage.adopt("sub/a.safetensors", published, digest, listed.files[1].pin)
    assert (stage.files / "sub/a.safetensors").samefile(published)
    assert stage.remaining_bytes(listed) == 2
    assert stage.have() == {"sub/a.safetensors": digest}
    assert Stage.open(tmp_path, "tiny", listed).have() == {"sub/a.safetensors": digest}
    with FilesServer(FILES) as server:
        ran = Ran(tmp_path)
        ran.fetch(listed, Plain(server.url))
        assert server.served == {"config.json": 2}
    assert ran.digests["sub/a.safetensors"] == digest


def test_published_file_is_never_written_when_it_turns_out_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reboot it would be hashed again in the stage; it has other names, so it is left alone and fetched."""
    published = tmp_path / "published"
    published.write_bytes(bytes(50_000))
    listed = listing(FILES)
    Stage.open(tmp_path, "tiny", listed).adopt("sub/a.safetensors", published, Digest(sha256(b""), "0" * 64), listed.files[1].pin)
    monkeypatch.setattr("vllmd.models.transfer.journal.boot_id", lambda: "another boot")
    with FilesServer(FILES) as server:
        ran = Ran(tmp_path)
        ran.fetch(listed, Plain(server.url))
    ran.check(FILES)
    assert published.read_bytes() == bytes(50_000)
