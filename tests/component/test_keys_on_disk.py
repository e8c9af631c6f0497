"""Keys on the disk, below a directory of somebody else's: owners, links, modes, many at once."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from tests.component.api_keys import public
from tests.needs import need
from vllmd.config.paths import Paths, root_paths
from vllmd.core.keyring import DEFAULT, Ring, add, document
from vllmd.errors import ConfigError, StorageFailed, VllmdError
from vllmd.instance import keys
from vllmd.system.folder import Folder

pytestmark = pytest.mark.component

NOBODY = 65534


@pytest.fixture
def theirs(tmp_path: Path) -> Paths:
    need(os.geteuid() == 0, "root, who writes below a directory of another user")
    paths = root_paths(tmp_path)
    (paths.state / "instances").mkdir(parents=True)
    for path in (paths.state, paths.state / "instances"):
        os.chown(path, NOBODY, NOBODY)
    return paths


def test_what_root_makes_belongs_to_the_owner_of_the_directory(theirs: Paths) -> None:
    keys.ensure(theirs, "demo", wanted=True)
    for name in ("instances/demo", "instances/demo/keys.json", "public", "public/demo", "public/demo/credentials.json"):
        about = (theirs.state / name).lstat()
        assert (about.st_uid, about.st_gid) == (NOBODY, NOBODY), name


def test_credentials_have_the_group_of_their_directory(theirs: Paths) -> None:
    directory = theirs.state / "public/demo"
    directory.mkdir(parents=True)
    os.chown(directory, NOBODY, 12345)
    keys.ensure(theirs, "demo", wanted=True)
    about = (directory / "credentials.json").stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (NOBODY, 12345, 0o640)


@pytest.mark.parametrize("name", ["instances", "instances/demo", "public", "public/demo"])
def test_a_link_in_the_way_is_not_followed(theirs: Paths, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    place = theirs.state / name
    if place.is_dir():
        place.rmdir()
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(target)
    with pytest.raises(StorageFailed):
        keys.ensure(theirs, "demo", wanted=True)
    assert list(target.rglob("*")) == []
    assert target.stat().st_uid == 0


@pytest.mark.parametrize("name", ["instances/demo/keys.json", "public/demo/credentials.json"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "hard link"])
def test_what_stands_in_the_place_of_a_file_is_never_written_through(theirs: Paths, tmp_path: Path, name: str, kind: str) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root:x")
    secret.chmod(0o600)
    place = theirs.state / name
    place.parent.mkdir(parents=True)
    match kind:
        case "link":
            place.symlink_to(secret)
        case "fifo":
            os.mkfifo(place)
        case "hard link":
            place.hardlink_to(secret)
        case _:
            place.mkdir()
    try:
        keys.ensure(theirs, "demo", wanted=True)
    except VllmdError:
        pass
    else:
        assert place.is_file()
        assert not place.is_symlink()
    assert (secret.read_text(), secret.stat().st_uid, stat.S_IMODE(secret.stat().st_mode)) == ("root:x", 0, 0o600)


def test_keys_are_not_read_through_a_link(theirs: Paths, tmp_path: Path) -> None:
    """Else root would publish what another file holds."""
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(document(Ring((keys.new_key(DEFAULT),))))
    (theirs.state / "instances/demo").mkdir()
    (theirs.state / "instances/demo/keys.json").symlink_to(elsewhere)
    with pytest.raises(StorageFailed):
        keys.read(theirs, "demo")
    with pytest.raises(StorageFailed):
        keys.ensure(theirs, "demo", wanted=True)
    assert not (theirs.state / "public").exists()


def test_nothing_is_lost_when_many_change_the_keys_at_once(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    keys.ensure(paths, "demo", wanted=True)

    def make(number: int) -> None:
        keys.change(paths, "demo", lambda ring: add(ring, keys.new_key(f"k{number}")))

    threads = [threading.Thread(target=make, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    ring = keys.read(paths, "demo").ring
    assert {key.name for key in ring.keys} == {DEFAULT, *(f"k{number}" for number in range(20))}
    assert {path.name for path in (paths.state / "instances/demo").iterdir()} == {"keys.json"}


def test_a_refused_change_writes_nothing(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)

    def refuse(_ring: Ring) -> Ring:
        raise ConfigError("no", "not this one")

    with pytest.raises(ConfigError, match="not this one"):
        keys.change(paths, "demo", refuse)
    assert keys.read(paths, "demo").ring == Ring()
    assert not (paths.state / "public").exists()


def test_the_link_of_the_first_instance_stays(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    first, second = (keys.ensure(paths, name, wanted=True).ring.values[0] for name in ("one", "two"))
    assert json.loads((paths.state / "public/credentials.json").read_text()) == {"apiKey": first}
    assert public(tmp_path, "two") == second


def test_a_file_of_the_wrong_mode_is_made_private_again(tmp_path: Path) -> None:
    paths = root_paths(tmp_path)
    keys.ensure(paths, "demo", wanted=True)
    file = paths.state / "instances/demo/keys.json"
    file.chmod(0o644)
    keys.ensure(paths, "demo", wanted=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Folder.open(tmp_path) as folder:
        folder.write("a", "old", 0o600)

        def fail(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            folder.write("a", "new", 0o600)
        assert folder.read("a", 10) == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
