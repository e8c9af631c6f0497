"""The downloader on file systems that fill up, turn read-only, or are no place for splice."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.component.downloads import LIMITS, Plain, Ran, listing, noise
from tests.fakes.files_server import Exchange, FilesServer
from tests.needs import need
from vllmd.errors import StorageFailed, VllmdError

pytestmark = pytest.mark.component

FILES = {"config.json": b"{}", "a.safetensors": noise(6_000_000, 1), "b.safetensors": noise(6_000_000, 2)}


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    need(os.geteuid() == 0, "root")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "vllmd-test", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_disk_full_says_so_keeps_what_came_and_goes_on_later(small: Path) -> None:
    ran = Ran(small / "store")
    with FilesServer(FILES) as server:
        with pytest.raises(StorageFailed) as raised:
            ran.fetch(listing(FILES), Plain(server.url))
        assert raised.value.code == "disk_full"
        subprocess.run(["mount", "-o", "remount,size=32m", str(small)], check=True)
        served = sum(server.served.values())
        ran.fetch(listing(FILES), Plain(server.url))
        again = sum(server.served.values()) - served
    ran.check(FILES)
    assert again < 6_000_000


@pytest.mark.parametrize("room_kib", [64, 100, 1000, 3000, 5900, 6000, 7000])
def test_disk_full_at_any_write(small: Path, room_kib: int) -> None:
    filler = small / "filler"
    filler.write_bytes(bytes((8 << 20) - (room_kib << 10)))
    ran = Ran(small / "store")
    with FilesServer(FILES) as server:
        with pytest.raises(VllmdError) as raised:
            ran.fetch(listing(FILES), Plain(server.url), replace(LIMITS, connections=1))
        assert raised.value.code == "disk_full"
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=32m", str(small)], check=True)
        ran.fetch(listing(FILES), Plain(server.url))
    ran.check(FILES)


def test_no_inode_left(small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,nr_inodes=12", str(small)], check=True)
    files = {f"f{number}": b"x" for number in range(20)}
    ran = Ran(small / "store")
    with FilesServer(files) as server:
        with pytest.raises(StorageFailed) as raised:
            ran.fetch(listing(files), Plain(server.url))
        assert raised.value.code == "disk_full"
        subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(small)], check=True)
        ran.fetch(listing(files), Plain(server.url))
    ran.check(files)


def test_read_only_in_the_middle(small: Path) -> None:
    """With a file open for writing the kernel does not remount; a file system that failed does, which only its next open shows."""
    ran = Ran(small / "store")
    asked = [0]

    def rule(exchange: Exchange) -> bool:
        asked[0] += 1
        if asked[0] == 2:
            subprocess.run(["mount", "-o", "remount,ro", str(small)], check=False)
        return False

    files = {"a": noise(100_000), "b": noise(100_000, 2)}
    with FilesServer(files, rule=rule) as server:
        ran.fetch(listing(files), Plain(server.url))
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises((StorageFailed, OSError)) as raised:
            ran.fetch(listing({**files, "c": b"new"}), Plain(server.url))
        assert getattr(raised.value, "code", "") == "read_only" or getattr(raised.value, "errno", 0) == errno.EROFS
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    ran.check(files)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT, errno.ENOSPC])
def test_failing_disk_is_said_with_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    splice = os.splice

    def failing(source: int, sink: int, count: int, offset_src: int | None = None, offset_dst: int | None = None) -> int:
        if offset_dst:
            raise OSError(number, os.strerror(number))
        return splice(source, sink, count, offset_src=offset_src, offset_dst=offset_dst)

    monkeypatch.setattr(os, "splice", failing)
    with FilesServer(FILES) as server, pytest.raises(StorageFailed, match=r"\.safetensors"):
        Ran(tmp_path).fetch(listing(FILES), Plain(server.url))


def test_disk_that_cannot_read_back_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with FilesServer(FILES) as server, pytest.raises(StorageFailed):
        Ran(tmp_path).fetch(listing(FILES), Plain(server.url))


def test_file_system_without_splice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splice = os.splice

    def refusing(source: int, sink: int, count: int, offset_src: int | None = None, offset_dst: int | None = None) -> int:
        if offset_dst is not None:
            raise OSError(errno.EINVAL, "Invalid argument")
        return splice(source, sink, count)

    monkeypatch.setattr(os, "splice", refusing)
    ran = Ran(tmp_path)
    with FilesServer(FILES) as server:
        ran.fetch(listing(FILES), Plain(server.url))
    ran.check(FILES)
