"""Small files: atomic, bounded, never through a symlink."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vllmd.errors import PermissionMissing, StorageFailed
from vllmd.system.files import read_small, storage_error, write_atomic

pytestmark = pytest.mark.component


def test_write_replaces_content_with_the_mode_asked_whatever_the_umask(tmp_path: Path) -> None:
    target = tmp_path / "status.json"
    target.write_text("old")
    previous = os.umask(0o077)
    try:
        write_atomic(target, "new", mode=0o644)
    finally:
        os.umask(previous)
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_reader_never_sees_half_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "status.json"
    write_atomic(target, b"a" * 100_000, fsync=False)
    with target.open("rb") as old:
        write_atomic(target, b"b" * 200_000, fsync=False)
        assert old.read() == b"a" * 100_000
    assert target.read_bytes() == b"b" * 200_000


def test_a_symlink_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    target = tmp_path / "launch.json"
    target.symlink_to(victim)
    write_atomic(target, "new")
    assert victim.read_text() == "mine"
    assert not target.is_symlink()


def test_full_disk_leaves_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "last.json"
    target.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vllmd.system.files.os.fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomic(target, "new")
    assert isinstance(storage_error(caught.value, "write last.json"), StorageFailed)
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.json"]


def test_reading_refuses_links_fifos_directories_and_large_files(tmp_path: Path) -> None:
    regular = tmp_path / "regular"
    regular.write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to(regular)
    os.mkfifo(tmp_path / "fifo")
    assert read_small(regular, 100) == b"x" * 100
    for name, limit, number in (("link", 100, errno.ELOOP), ("fifo", 100, errno.EINVAL), (".", 9, errno.EINVAL), ("regular", 99, errno.EFBIG)):
        with pytest.raises(OSError, match=r".") as caught:
            read_small(tmp_path / name, limit)
        assert caught.value.errno == number, name


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, StorageFailed, "disk_full"),
        (errno.EDQUOT, StorageFailed, "quota_exceeded"),
        (errno.EIO, StorageFailed, "io_error"),
        (errno.EROFS, StorageFailed, "read_only"),
        (errno.EACCES, PermissionMissing, "permission_missing"),
        (errno.EPERM, PermissionMissing, "permission_missing"),
    ],
)
def test_each_errno_becomes_the_error_an_operator_can_act_on(number: int, kind: type[Exception], code: str) -> None:
    error = storage_error(OSError(number, os.strerror(number)), "write /x/last.json")
    assert isinstance(error, kind)
    assert error.code == code
    assert "/x/last.json" in error.what
    assert error.hint
