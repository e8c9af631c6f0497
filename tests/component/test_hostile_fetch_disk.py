"""The store's disk full at whatever write, or read-only: status 74, the version before still served, and the next fetch, with
room again, goes through."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests import publishing
from tests.component.hostile import Bucket, World, check_refusal, s3_world
from tests.fakes.s3_server import Asked, Reply, S3Server
from tests.needs import need

pytestmark = pytest.mark.component

PAGE = 4096
ROOM = 1 << 30
"""Of which a tmpfs takes only what is written. A fetch wants some left over: it is refused before it begins where there is less."""


@pytest.fixture(scope="module")
def mounted() -> Iterator[tuple[World, Bucket, S3Server]]:
    with s3_world() as (made, bucket, server):
        made.store.rmdir()
        made.store.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "vllmd-test", str(made.store)], capture_output=True, check=False)
        need(done.returncode == 0, "may mount a tmpfs")
        try:
            made.publish_good()
            yield made, bucket, server
        finally:
            subprocess.run(["umount", "-l", str(made.store)], check=True)


def remount(world: World, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(world.store)], check=True)


def shrink(world: World, pages: int) -> None:
    """The kernel refuses a size below what is in use, which may grow meanwhile."""
    for more in range(200):
        size = used(world) + (pages + more) * PAGE
        if subprocess.run(["mount", "-o", f"remount,size={size}", str(world.store)], capture_output=True, check=False).returncode == 0:
            return


def used(world: World) -> int:
    status = os.statvfs(world.store)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.mark.parametrize("pages", [0, 1, 2, 5, 10, 20, 40])
def test_disk_that_fills_up_during_the_fetch(mounted: tuple[World, Bucket, S3Server], pages: int) -> None:
    """When the first byte is asked for, so many pages are left, which end at another write each."""
    world, bucket, _ = mounted
    version = world.link.resolve()
    bucket.set(world.good())
    shrunk = threading.Lock()

    def script(asked: Asked) -> Reply | None:
        if "list-type=2" not in asked.target and shrunk.acquire(blocking=False):
            shrink(world, pages)
        return None

    bucket.script = script
    try:
        outcome = world.fetch()
    finally:
        remount(world, f"size={ROOM}")
    if pages == 0 or outcome.status:
        check_refusal(outcome, 74, "No space left on device", str(world.store))
        assert world.link.resolve() == version
    assert publishing.wrong(world.store, world.asked) == []
    assert world.publish_good() != version


def test_disk_without_the_room_is_refused_before_the_first_byte(mounted: tuple[World, Bucket, S3Server]) -> None:
    world, bucket, _ = mounted
    version = world.link.resolve()
    bucket.set(world.good())
    bucket.sent_bytes.clear()
    remount(world, f"size={used(world) + 10 * PAGE}")
    try:
        outcome = world.fetch()
    finally:
        remount(world, f"size={ROOM}")
    check_refusal(outcome, 74, str(world.store), "are to be fetched")
    assert not bucket.sent_bytes
    assert world.link.resolve() == version
    assert world.publish_good() != version


def test_store_that_is_read_only(mounted: tuple[World, Bucket, S3Server]) -> None:
    world, bucket, _ = mounted
    version = world.link.resolve()
    bucket.set(world.good())
    remount(world, "ro")
    try:
        outcome = world.fetch()
    finally:
        remount(world, "rw")
    check_refusal(outcome, 74, str(world.store))
    assert world.link.resolve() == version
    assert publishing.wrong(world.store, world.asked) == []
    assert world.publish_good() != version
