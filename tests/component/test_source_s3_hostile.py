"""The S3 source against stores that answer wrongly, or never; whom it asks as; and the ways there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.component.test_source_s3 import environ, find
from tests.fakes.s3_server import Asked, Reply, S3Server, Script, error, item, listing
from vllmd.errors import ConfigError, ModelInvalid, PermissionMissing, SourceUnavailable, VllmdError
from vllmd.models.sources import s3_direct, s3_http, s3_listing, s3_store, s3_transport

pytestmark = [pytest.mark.component, pytest.mark.usefixtures("environ")]

__all__ = ["environ"]

FILE = item("p/Tiny/config.json")


def refusal(script: Script, **settings: Any) -> tuple[VllmdError, list[Asked]]:
    with S3Server(script) as server, pytest.raises(VllmdError) as caught:
        find(server.url, **settings)
    said = caught.value.what + caught.value.hint
    assert "verysecret" not in said
    assert caught.value.what.isprintable()
    return caught.value, server.asked


@pytest.fixture
def by_botocore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is counted how often botocore asks: s3_direct asks once before it."""
    monkeypatch.setattr(s3_direct, "asked", lambda *_: None)


def always(reply: Reply) -> Script:
    return lambda _asked: reply


@pytest.mark.parametrize(
    ("reply", "kind", "text"),
    [
        (error(403, "AccessDenied", "verysecret+/key is not allowed"), PermissionMissing, "AccessDenied"),
        (error(403, "RequestTimeTooSkewed"), SourceUnavailable, "RequestTimeTooSkewed"),
        (error(404, "NoSuchBucket"), ConfigError, "bucket models"),
        (error(400, "InvalidArgument", "Credential access key has length 20, should be 32"), PermissionMissing, "length 20"),
        (error(503, "SlowDown"), SourceUnavailable, "SlowDown"),
        (error(500, "InternalError"), SourceUnavailable, "InternalError"),
        (error(200, "InternalError"), SourceUnavailable, "does not answer with a listing"),
        (Reply(200, b"<!DOCTYPE html><html><body>Sign in</body></html>"), SourceUnavailable, "does not answer with a listing"),
        (Reply(200, b"<html><body>Sign in</body></html>"), SourceUnavailable, "does not answer with a listing"),
        (Reply(200, b""), SourceUnavailable, "does not answer with a listing"),
        (Reply(200, b'{"files": []}'), SourceUnavailable, "does not answer with a listing"),
        (Reply(200, b"<ListBucketResult><Contents><Key>p/Ti"), SourceUnavailable, "answers 500"),
        (Reply(200, b'<!DOCTYPE a [<!ENTITY b "cc">]><ListBucketResult>&b;</ListBucketResult>'), SourceUnavailable, "does not answer"),
        (Reply(200, b'<ListBucketResult><!DOCTYPE a [<!ENTITY b "cc">]></ListBucketResult>'), SourceUnavailable, "does not answer"),
        (listing(FILE.replace("<Size>3<", "<Size>many<")), SourceUnavailable, "does not answer with a listing"),
        (listing(FILE.replace("<Size>3</Size>", "")), SourceUnavailable, "without a key or a size"),
        (listing(FILE.replace("2026-01-01", "yesterday")), SourceUnavailable, "does not answer with a listing"),
        (listing(item("other/config.json")), ModelInvalid, "does not begin so"),
        (listing(FILE, truncated=True), SourceUnavailable, "does not say where it goes on"),
        (Reply(404, b"<html>nginx</html>"), ConfigError, "404"),
        (Reply(405, b""), ConfigError, "405"),
        (Reply(302, b"", {"Location": "http://127.0.0.1:9/"}), ConfigError, "302"),
    ],
)
def test_a_wrong_answer_is_said_as_what_it_is(reply: Reply, kind: type[VllmdError], text: str) -> None:
    found, asked = refusal(always(reply))
    assert type(found) is kind, found.what
    assert text in found.what
    assert "s3://models/p/Tiny/" in found.what or "bucket models" in found.what
    assert found.hint
    assert len(asked) <= 2 * s3_store.ATTEMPTS


@pytest.mark.usefixtures("by_botocore")
def test_pages_are_put_together() -> None:
    def script(asked: Asked) -> Reply:
        number = int(asked.token or "0")
        return listing(item(f"p/Tiny/{number}.txt"), token=str(number + 1) if number < 4 else "")

    with S3Server(script) as server:
        offered = find(server.url)
    assert [file.name for file in offered.listing.files] == [f"{number}.txt" for number in range(5)]
    assert len(server.asked) == 5


@pytest.mark.usefixtures("by_botocore")
def test_a_listing_that_goes_round_in_circles() -> None:
    found, asked = refusal(always(listing(FILE, token="again")))
    assert isinstance(found, SourceUnavailable)
    assert "circles" in found.what
    assert len(asked) == 2


@pytest.mark.usefixtures("by_botocore")
def test_a_listing_without_end_of_empty_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_listing, "MAX_PAGES", 20)
    counter = itertools.count()
    found, asked = refusal(lambda _asked: listing(token=f"t{next(counter)}"))
    assert isinstance(found, SourceUnavailable)
    assert "has no end" in found.what
    assert len(asked) == 21


@pytest.mark.usefixtures("by_botocore")
def test_a_listing_without_end_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_listing, "MAX_FILES", 250)
    counter = itertools.count()
    found, asked = refusal(lambda _asked: listing(*(item(f"p/Tiny/{next(counter)}") for _ in range(100)), token=f"t{next(counter)}"))
    assert isinstance(found, ModelInvalid)
    assert "more than 250 objects" in found.what
    assert len(asked) == 3


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_http, "MAX_ANSWER_BYTES", 1 << 20)
    found, _ = refusal(lambda _asked: Reply(200, itertools.repeat(b"<ListBucketResult>" * 1000)))
    assert isinstance(found, SourceUnavailable)
    assert "longer than" in found.what


@pytest.mark.usefixtures("by_botocore")
def test_a_store_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_http, "READ_S", 0.3)
    server = S3Server(lambda _asked: Reply(200, server.stalled(b"<ListBucketResult>")))
    with server, pytest.raises(SourceUnavailable, match="s3://models/p/Tiny/"):
        find(server.url)
    assert len(server.asked) == s3_store.ATTEMPTS


def test_a_store_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_http, "ANSWER_S", 0.3)

    def drip() -> Iterator[bytes]:
        while not server.closing.wait(0.02):
            yield b"<"

    server = S3Server(lambda _asked: Reply(200, drip()))
    with server, pytest.raises(SourceUnavailable, match="not complete after"):
        find(server.url)


def test_nobody_listens() -> None:
    with S3Server(always(listing())) as server:
        url = server.url
    with pytest.raises(SourceUnavailable, match=url):
        find(url)


def test_one_bad_moment_is_not_an_outage() -> None:
    replies = iter([error(503, "SlowDown"), listing(FILE)])
    with S3Server(lambda _asked: next(replies)) as server:
        assert find(server.url).listing.files


@pytest.mark.parametrize(
    "key", ["p/Tiny/%2e%2e/%2e%2e/etc/passwd", "p/Tiny//etc/passwd", "p/Tiny/a%0Ab", "p/Tiny/a%00b", "p/Tiny/%C0%AF", "p/Tiny/a%5Cb"]
)
def test_no_key_gets_past_the_check_of_listings(key: str, tmp_path: Path) -> None:
    """The names are handed on as they are, so that the check of all sources' names sees them."""
    from vllmd.models.listing import checked

    with S3Server(always(listing(item(key)))) as server:
        offered = find(server.url)
    if key.endswith("%C0%AF"):  # U+FFFD twice, which is a name like any other
        checked(offered.listing)
        return
    with pytest.raises(ModelInvalid):
        checked(offered.listing)


@pytest.mark.parametrize("etag", ["&quot;a&#13;&#10;X-Evil: 1&quot;", "W/&quot;abc&quot;", ""])
def test_no_etag_gets_into_a_header_that_does_not_fit_there(etag: str) -> None:
    with S3Server(always(listing(item("p/Tiny/a", etag=etag)))) as server:
        offered = find(server.url)
    [file] = offered.listing.files
    assert "If-Match" not in offered.transport.request(file, 0, 3).headers


def test_a_store_that_names_its_region_is_asked_again_with_it() -> None:
    def script(asked: Asked) -> Reply:
        if asked.region == "eu-west-3":
            return listing(FILE)
        return error(400, "AuthorizationHeaderMalformed", more="<Region>eu-west-3</Region>", x_amz_bucket_region="eu-west-3")

    with S3Server(script) as server:
        offered = find(server.url)
    assert server.asked[0].region == "auto"
    request = offered.transport.request(offered.listing.files[0], 0, 3)
    assert "/eu-west-3/s3/aws4_request" in request.headers["Authorization"]


@pytest.mark.parametrize(
    ("given", "settings", "region"),
    [({}, {}, "auto"), ({"AWS_DEFAULT_REGION": "eu-1"}, {}, "eu-1"), ({"AWS_REGION": "eu-2"}, {}, "eu-2"), ({"AWS_REGION": "eu-2"}, {"r2_region": "eu-3"}, "eu-3")],
)
def test_the_region(given: dict[str, str], settings: dict[str, str], region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with S3Server(always(listing(FILE))) as server:
        find(server.url, **settings)
    assert server.asked[0].region == region


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(always(listing(FILE))) as server:
        monkeypatch.setenv(name, server.url)
        offered = find("")
    assert (server.asked[0].path, server.asked[0].region) == ("/models", "auto")
    assert offered.transport.request(offered.listing.files[0], 0, 3).url == f"{server.url}/models/p/Tiny/config.json"


def test_a_bad_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no url")
    with pytest.raises(ConfigError):
        find("")


def test_a_bucket_that_no_store_can_have() -> None:
    with pytest.raises(ConfigError, match="models/p"):
        find("http://127.0.0.1:9", r2_bucket="models/p")


def test_virtual_hosts_by_configuration_and_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n    addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with S3Server(always(listing(FILE))) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        offered = find("http://store.test")
    assert proxy.asked[0].target.startswith("http://models.store.test/?list-type=2&")
    assert offered.transport.request(offered.listing.files[0], 0, 3).url == "http://models.store.test/p/Tiny/config.json"


def test_awss_own_store_by_virtual_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(always(Reply(403))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("https_proxy", proxy.url)
        with pytest.raises(SourceUnavailable):
            find("")
    assert proxy.asked == [], "https is tunnelled: a plain GET must not reach a proxy"


def test_the_usual_case_is_one_question_without_botocore() -> None:
    with S3Server(always(listing(FILE, item("p/Tiny/a%2Bb")))) as server:
        offered = find(server.url)
    assert isinstance(offered.transport, s3_direct.DirectTransport)
    assert [file.name for file in offered.listing.files] == ["config.json", "a+b"]
    assert len(server.asked) == 1
    assert server.asked[0].access_key == "AKIATESTING"


def test_a_store_with_sums_is_asked_for_them_by_botocore() -> None:
    with S3Server(always(listing(FILE.replace("</Size>", "</Size><ChecksumAlgorithm>CRC32C</ChecksumAlgorithm>")))) as server:
        offered = find(server.url)
    assert isinstance(offered.transport, s3_transport.S3Transport)
