"""Root with the rights of whoever owns a directory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.needs import need
from vllmd.system.owner import as_owner, controller

OWNER = 54321


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    need(os.geteuid() == 0, "root")
    path = tmp_path / "theirs"
    path.mkdir()
    os.chown(path, OWNER, OWNER)
    for above in path.parents:
        if above != Path("/") and not above.stat().st_mode & 1:
            above.chmod(0o711)
    return path


def test_what_only_root_may_is_refused_within_and_allowed_afterwards(theirs: Path) -> None:
    secret = theirs.parent / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    groups = os.getgroups()
    refused: list[BaseException] = []

    def read() -> None:
        try:
            secret.read_text()
        except PermissionError as error:
            refused.append(error)

    with as_owner(theirs):
        read()
        thread = threading.Thread(target=read)  # hashing works in threads
        thread.start()
        thread.join()
        (theirs / "made").touch()
    assert len(refused) == 2
    assert secret.read_text() == "root's"
    assert (os.geteuid(), os.getegid(), os.getgroups()) == (0, 0, groups)
    about = (theirs / "made").stat()
    assert (about.st_uid, about.st_gid) == (OWNER, OWNER)


def test_who_holds_the_way_controls_what_lies_below(theirs: Path) -> None:
    below = theirs / "below"
    below.mkdir()
    assert below.stat().st_uid == 0
    assert controller(below) == OWNER
    assert controller(theirs / "not/made/yet") == OWNER


def test_links_are_their_owners_and_lead_on(theirs: Path) -> None:
    (theirs / "there").symlink_to("/etc")
    assert controller(theirs / "there") == OWNER
    ours = theirs.parent / "ours"
    ours.symlink_to(theirs)
    assert controller(ours) == OWNER
    assert controller(Path("/etc")) == 0


def test_an_error_within_gives_the_rights_back(theirs: Path) -> None:
    with pytest.raises(KeyError), as_owner(theirs):
        raise KeyError
    assert os.geteuid() == 0
