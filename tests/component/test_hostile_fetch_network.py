"""A source that refuses, fails, lies or never ends while a good version is published: the right status, one clear line, the
version before still served, and the next good answer taken."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest

from tests.component.hostile import SHARD2, Bucket, World, check_refusal, digests, etag, hub_world, run
from tests.fakes import s3_server
from tests.fakes.hub import Asked, FakeHub, Reply, page, refusal
from tests.fakes.s3_server import S3Server

pytestmark = pytest.mark.component

STALL_S = 0.3
HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"


def of_api(reply: Callable[[FakeHub], Reply]) -> Callable[[FakeHub, Asked], Reply | None]:
    return lambda hub, asked: reply(hub) if asked.path.startswith("/api/") else None


def of_files(reply: Callable[[FakeHub], Reply]) -> Callable[[FakeHub, Asked], Reply | None]:
    return lambda hub, asked: reply(hub) if "/resolve/" in asked.path else None


def of_cdn(reply: Callable[[FakeHub], Reply]) -> Callable[[FakeHub, Asked], Reply | None]:
    return lambda hub, asked: reply(hub) if asked.server == "cdn" else None


def short(hub: FakeHub, asked: Asked) -> Reply | None:
    """Ten bytes less than are announced, each time."""
    if asked.server != "cdn":
        return None
    whole = hub._cdn_file(asked)
    assert isinstance(whole.body, bytes)
    return Reply(whole.status, [whole.body[:10]], {**whole.headers, "Content-Length": str(len(whole.body))})


def stalling(hub: FakeHub, asked: Asked) -> Reply | None:
    if asked.server != "cdn":
        return None
    whole = hub._cdn_file(asked)
    return Reply(whole.status, hub.stalled(), {**whole.headers, "Content-Length": "100000"})


def other_bytes(hub: FakeHub, asked: Asked) -> Reply | None:
    if asked.server != "cdn":
        return None
    whole = hub._cdn_file(asked)
    assert isinstance(whole.body, bytes)
    return Reply(whole.status, bytes(len(whole.body)), whole.headers)


def looping(hub: FakeHub, asked: Asked) -> Reply | None:
    return Reply(302, b"", {"Location": f"{hub.url}{asked.target}"})


def gated(_hub: FakeHub) -> Reply:
    return refusal(403, "GatedRepo", "Access to model acme/Tiny is restricted\x1b[31m and you are not in the authorized list.")


def no_more(hub: FakeHub, asked: Asked) -> Reply | None:
    return Reply(302, b"", {"Location": f"{hub.url}/{time.monotonic_ns()}"}) if "/resolve/" in asked.path or asked.path[1:].isdigit() else None


def many(count: int) -> Callable[[FakeHub], Reply]:
    return lambda hub: page({"id": "acme/Tiny", "sha": "a" * 40, "siblings": [{"rfilename": f"d/{n}.txt", "size": 1, "blobId": f"{n:040x}"} for n in range(count)]})


HUB: list[tuple[str, Callable[[FakeHub, Asked], Reply | None], int, str]] = [
    ("401", of_api(lambda hub: refusal(401, "RepoNotFound", "Invalid username or password.")), 66, "no such repository"),
    ("403-gated", of_files(gated), 77, "gated"),
    ("403", of_api(lambda hub: Reply(403, b"no")), 77, "403"),
    ("404", of_api(lambda hub: refusal(404, "RepoNotFound", "Repository not found")), 66, "no such repository"),
    ("404-file", of_files(lambda hub: refusal(404, "EntryNotFound", "Entry not found")), 66, "404"),
    ("429-api", of_api(lambda hub: Reply(429, b"slow", {"Retry-After": "86400"})), 66, "429"),
    ("500-api", of_api(lambda hub: Reply(500, b"down")), 66, "500"),
    ("html-api", of_api(lambda hub: Reply(200, HTML, {"Content-Type": "text/html"})), 66, "does not answer with a listing"),
    ("html-file", of_cdn(lambda hub: Reply(200, HTML, {"Content-Type": "text/html"})), 66, ""),
    ("loop-api", looping, 66, "redirect"),
    ("loop-file", no_more, 66, "redirect"),
    ("100000-files", of_api(many(100_000)), 65, "lists 100000 files"),
]
SLOW: list[tuple[str, Callable[[FakeHub, Asked], Reply | None], int, str]] = [
    ("429-file", of_cdn(lambda hub: Reply(429, b"slow", {"Retry-After": "1"})), 66, "429"),
    ("500-file", of_cdn(lambda hub: Reply(500, b"down")), 66, "500"),
    ("short", short, 66, ""),
    ("stall", stalling, 66, ""),
    ("other-bytes", other_bytes, 65, SHARD2),
]


@pytest.mark.parametrize(("script", "status", "text"), [case[1:] for case in HUB], ids=[case[0] for case in HUB])
def test_hub_that_fails(served: tuple[World, FakeHub], script: Callable[[FakeHub, Asked], Reply | None], status: int, text: str) -> None:
    world, hub = served
    before, version = digests(world.around, world.store), world.link.resolve()
    world.set_content(world.good())
    hub.script = lambda asked: script(hub, asked)
    check_refusal(world.fetch(), status, text, "acme/Tiny")
    world.check_served(version, before)
    assert world.publish_good() != version


def test_hubs_that_never_deliver() -> None:
    """All at once: each takes the seconds of its attempts and the pauses between them."""
    with ExitStack() as stack, ThreadPoolExecutor(len(SLOW)) as pool:
        worlds = [stack.enter_context(hub_world()) for _ in SLOW]
        before = [(world.publish_good(), digests(world.around, world.store)) for world, _ in worlds]
        for (world, hub), (_, script, _, _) in zip(worlds, SLOW, strict=True):
            world.set_content(world.good())
            hub.script = partial(script, hub)
        outcomes = list(pool.map(lambda made: made[0].fetch(), worlds))
        for (world, _), (_, _, status, text), (version, canary), outcome in zip(worlds, SLOW, before, outcomes, strict=True):
            check_refusal(outcome, status, text, "acme/Tiny")
            world.check_served(version, canary)
            assert world.publish_good() != version


def refused(code: str, status: int) -> Callable[[], s3_server.Reply]:
    return lambda: s3_server.error(status, code, "said\u202e\n the store")


counter = itertools.count()
S3: list[tuple[str, Callable[[], s3_server.Reply], int, str]] = [
    ("AccessDenied", refused("AccessDenied", 403), 77, "AccessDenied"),
    ("NoSuchBucket", refused("NoSuchBucket", 404), 78, "bucket models"),
    ("clock", refused("RequestTimeTooSkewed", 403), 66, "RequestTimeTooSkewed"),
    ("SlowDown", refused("SlowDown", 503), 66, "SlowDown"),
    ("html", lambda: s3_server.Reply(200, HTML), 66, "does not answer with a listing"),
    ("circles", lambda: s3_server.listing(s3_server.item("p/Tiny/a.txt"), token="again"), 66, "circles"),
    ("endless", lambda: s3_server.listing(token=f"t{next(counter)}"), 66, "has no end"),
    (
        "100001-objects",
        lambda: s3_server.listing(*(s3_server.item(f"p/Tiny/{next(counter)}") for _ in range(10_000)), token=f"t{next(counter)}"),
        65,
        "more than 100000 objects",
    ),
]


@pytest.mark.parametrize(("reply", "status", "text"), [pytest.param(*case[1:], id=case[0], marks=[pytest.mark.soak] if case[0] == "100001-objects" else []) for case in S3])
def test_bucket_that_fails(bucketed: tuple[World, Bucket, S3Server], reply: Callable[[], s3_server.Reply], status: int, text: str) -> None:
    world, bucket, _ = bucketed
    before, version = digests(world.around, world.store), world.link.resolve()
    bucket.set(world.good())
    bucket.script = lambda asked: reply() if "list-type=2" in asked.target else None
    check_refusal(world.fetch(), status, text)
    world.check_served(version, before)
    assert world.publish_good() != version


@pytest.mark.parametrize("code", ["AccessDenied", "RequestTimeTooSkewed"])
def test_bucket_that_lists_but_refuses_the_bytes(bucketed: tuple[World, Bucket, S3Server], code: str) -> None:
    world, bucket, _ = bucketed
    before, version = digests(world.around, world.store), world.link.resolve()
    bucket.set(world.good())
    bucket.script = lambda asked: None if "list-type=2" in asked.target else s3_server.error(403, code)
    check_refusal(world.fetch(), 77 if code == "AccessDenied" else 66, code, "s3://models/p/Tiny/")
    world.check_served(version, before)
    assert world.publish_good() != version


def test_object_replaced_during_the_download_is_listed_again(bucketed: tuple[World, Bucket, S3Server]) -> None:
    """Only whole versions are published: never one file of the first upload beside one of the second."""
    world, bucket, _ = bucketed
    bucket.set(world.good())
    second, swapped = world.good(), threading.Event()

    def script(asked: s3_server.Asked) -> s3_server.Reply | None:
        if asked.path.endswith(SHARD2) and not swapped.is_set():
            swapped.set()
            bucket.files = second
        return None

    bucket.script = script
    outcome = world.fetch(source_timeout_s=20, source_retry_s=0.05)
    assert (outcome.status, outcome.stderr) == (0, b"")
    assert swapped.is_set()
    assert {path.name: path.read_bytes() for path in world.link.resolve().iterdir() if path.name in second} == second


def test_object_that_is_replaced_again_and_again(bucketed: tuple[World, Bucket, S3Server]) -> None:
    world, bucket, _ = bucketed
    before, version = digests(world.around, world.store), world.link.resolve()
    bucket.set(world.good())
    bucket.script = lambda asked: s3_server.error(412, "PreconditionFailed") if asked.path.endswith(SHARD2) else None
    check_refusal(world.fetch(source_timeout_s=0.5, source_retry_s=0.1), 66, SHARD2)
    world.check_served(version, before)
    assert world.publish_good() != version


def test_object_of_other_bytes_under_the_same_etag_and_length(bucketed: tuple[World, Bucket, S3Server]) -> None:
    """Nothing tells but the sums that the bucket brings along."""
    world, bucket, _ = bucketed
    before, version = digests(world.around, world.store), world.link.resolve()
    files = world.good()
    files["sha256sums.txt"] = f"{hashlib.sha256(files[SHARD2]).hexdigest()}  {SHARD2}\n".encode()
    bucket.set(files)
    wrong = files[SHARD2][:-4] + b"\xde\xad\xbe\xef"

    def script(asked: s3_server.Asked) -> s3_server.Reply | None:
        if not asked.path.endswith(SHARD2):
            return None
        reply = bucket.piece(replace(asked, headers={**asked.headers, "if-match": etag(wrong)}), SHARD2, wrong)
        return replace(reply, headers={**reply.headers, "ETag": etag(files[SHARD2])})

    bucket.script = script
    check_refusal(world.fetch(), 65, SHARD2)
    world.check_served(version, before)
    assert world.publish_good() != version


def test_two_resolvers_at_once_fetch_once(bucketed: tuple[World, Bucket, S3Server]) -> None:
    world, bucket, _ = bucketed
    files = world.good()
    bucket.set(files)
    bucket.sent_bytes.clear()
    outcomes: list[object] = []
    threads = [threading.Thread(target=lambda: outcomes.append(run(world.asked, world.settings, world.variables).status)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [0, 0, 0]
    assert bucket.sent_bytes[SHARD2] == len(files[SHARD2])
    assert world.link.resolve().joinpath(SHARD2).read_bytes() == files[SHARD2]


def test_clock_set_back_since_the_last_fetch(bucketed: tuple[World, Bucket, S3Server]) -> None:
    """What was published then is dated in the future now: it is still up to date, and still followed by what comes after."""
    world, _, _ = bucketed
    version = world.publish_good()
    future = time.time() + 10 * 365 * 86400
    for path in (version, *version.iterdir(), world.link):
        os.utime(path, (future, future), follow_symlinks=False)
    outcome = world.fetch()
    assert (outcome.status, outcome.stderr) == (0, b"")
    assert world.link.resolve() == version
    newer = world.publish_good()
    assert newer != version
    assert world.publish_good() not in (newer, version)
    assert newer.is_dir(), "of two versions the one before the current is kept, whatever the clock said"
