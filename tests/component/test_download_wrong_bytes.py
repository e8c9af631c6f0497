"""The downloader and answers that are not what was listed: lengths, encodings, parts, replaced objects, sums."""

from __future__ import annotations

import hashlib
import zlib

import pytest

from tests.component.downloads import FILES, MODEL, ORIGIN, Plain, Ran, listing, noise, sha256
from tests.fakes.files_server import (
    Exchange,
    FilesServer,
    chunked,
    no_ranges,
    status,
)
from vllmd.errors import ModelInvalid, SourceUnavailable
from vllmd.models.remote import Listing, RemoteFile

pytestmark = pytest.mark.component


def test_shorter_or_longer_than_listed_is_a_changed_source(ran: Ran) -> None:
    for size in (len(FILES[MODEL]) - 1, len(FILES[MODEL]) + 1):
        files = {MODEL: noise(size)}
        for rule in (None, no_ranges):
            with FilesServer(files, rule=rule) as server, pytest.raises(SourceUnavailable) as raised:
                ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
            assert raised.value.code == "source_changed"
            assert MODEL in raised.value.what
            assert len(server.seen) == 1


def test_longer_without_a_length_is_a_changed_source(ran: Ran) -> None:
    with FilesServer({MODEL: noise(3_000_001)}, rule=chunked) as server, pytest.raises(SourceUnavailable) as raised:
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
    assert raised.value.code == "source_changed"


def test_web_page_with_200_is_named_as_one(ran: Ran) -> None:
    page = status(200, b"<html>log in</html>", Content_Type="text/html; charset=utf-8")
    with FilesServer(FILES, rule=page) as server, pytest.raises(SourceUnavailable) as raised:
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
    assert raised.value.code == "captive_portal"


def test_encoded_body_is_refused(ran: Ran) -> None:
    rule = status(200, bytes(len(FILES[MODEL])), Content_Encoding="gzip")
    with FilesServer(FILES, rule=rule) as server, pytest.raises(SourceUnavailable, match="gzip"):
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
    assert {seen.headers["Accept-Encoding"] for seen in server.seen} == {"identity"}


def test_part_that_is_another_part_is_refused(ran: Ran) -> None:
    rule = status(206, b"x" * 100, Content_Range=f"bytes 5-104/{len(FILES[MODEL])}")
    with FilesServer(FILES, rule=rule) as server, pytest.raises(SourceUnavailable, match="other bytes"):
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
    assert not (ran.files / MODEL).exists()


@pytest.mark.parametrize("kind", ["If-Match", "ETag"])
def test_object_replaced_meanwhile(ran: Ran, kind: str) -> None:
    listed = Listing((RemoteFile(MODEL, 3_000_000, pin='"0123456789abcdef0123456789abcdef-2"'),), ORIGIN)
    headers = {"If-Match": '"0123456789abcdef0123456789abcdef-2"'} if kind == "If-Match" else {}
    tags = {MODEL: "fedcba9876543210fedcba9876543210-2"}
    with FilesServer({MODEL: FILES[MODEL]}, tags=tags) as server, pytest.raises(SourceUnavailable) as raised:
        ran.fetch(listed, Plain(server.url, headers))
    assert raised.value.code == "source_changed"


def test_etag_of_another_kind_than_the_pin_says_nothing(ran: Ran) -> None:
    files = {MODEL: FILES[MODEL]}
    listed = Listing((RemoteFile(MODEL, 3_000_000, pin="0123456789abcdef0123456789abcdef"),), ORIGIN)
    with FilesServer(files, tags={MODEL: "65f0-2dc6c0"}) as server:
        ran.fetch(listed, Plain(server.url))
    ran.check(files)


def test_wrong_bytes_once_are_healed(ran: Ran) -> None:
    files = {MODEL: FILES[MODEL]}

    def wrong(exchange: Exchange) -> bool:
        begin, end = exchange.asked or (0, 0)
        exchange.reply(206, bytes(end - begin), {"Content-Range": f"bytes {begin}-{end - 1}/{len(FILES[MODEL])}"})
        return True

    with FilesServer(files, script=[wrong]) as server:
        ran.fetch(listing(files), Plain(server.url))
    ran.check(files)
    assert "fetched anew" in ran.log
    assert ran.progress[-1].done_bytes == len(FILES[MODEL])


@pytest.mark.parametrize("algorithm", ["sha256", "md5", "git-sha1", "crc32"])
def test_bytes_that_stay_wrong_end_with_both_sums(ran: Ran, algorithm: str) -> None:
    listed = "0" * {"sha256": 64, "md5": 32, "git-sha1": 40, "crc32": 8}[algorithm]
    remote = Listing((RemoteFile(MODEL, 3_000_000, "p", {algorithm: listed}),), ORIGIN)
    with FilesServer(FILES) as server, pytest.raises(ModelInvalid) as raised:
        ran.fetch(remote, Plain(server.url))
    assert raised.value.code == "model_corrupt"
    for part in (MODEL, ORIGIN, listed, algorithm):
        assert part in raised.value.what
    assert server.served[MODEL] == 2 * len(FILES[MODEL])
    assert not (ran.files / MODEL).exists()


def test_listed_sums_of_all_kinds_are_accepted(ran: Ran) -> None:
    data = FILES[MODEL]
    sums = {
        "md5": hashlib.md5(data).hexdigest(),
        "git-sha1": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        "crc32": f"{zlib.crc32(data):08x}",
        "crc32c": "not hex",
        "sha3": "unknown",
    }
    with FilesServer(FILES) as server:
        ran.fetch(Listing((RemoteFile(MODEL, len(data), "p", sums),), ORIGIN), Plain(server.url))
    assert ran.digests[MODEL].sha256 == sha256(data)
