"""What the S3 source makes of settings, ETags, checksums and errors, without a network."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from tests import tiny_models
from vllmd.config.settings import Model
from vllmd.errors import ConfigError, ModelNotFound, PermissionMissing, SourceUnavailable, VllmdError
from vllmd.models.remote import RemoteFile
from vllmd.models.sources import Context, Skipped, s3_errors, s3_listing, s3_store, s3_transport
from vllmd.models.sources.s3 import S3, key_prefix
from vllmd.models.sources.s3_errors import Answer, Place

pytestmark = pytest.mark.unit

SECRET = "wJalrXUtnFEMIK7MDENG"
PLACE = Place("models", "p/Tiny/", "https://store.test", "the keys in AWS_ACCESS_KEY_ID", (SECRET,))


@pytest.mark.parametrize(("settings", "reason"), [(Model(), "R2_BUCKET not set"), (Model(r2_bucket="b", offline=True), "offline")])
def test_not_asked(settings: Model, reason: str, tmp_path: Path) -> None:
    assert S3().find(tiny_models.request(tmp_path), Context(settings, {})) == Skipped(reason)


def test_who_has_no_bucket_pays_nothing_for_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vllmd.models.sources import Context, get; from vllmd.config.settings import Model\n"
        "from vllmd.core.model import ModelRequest\n"
        "get('r2').find(ModelRequest('a', '', '', '', (), Path('/')), Context(Model(), {}))\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('botocore', 'boto3', 'urllib3')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("settings", "prefix"),
    [
        (Model(), "Tiny/"),
        (Model(r2_models_prefix="models"), "models/Tiny/"),
        (Model(r2_models_prefix="/a/b/"), "a/b/Tiny/"),
        (Model(r2_models_prefix="models", r2_object_prefix="else/where/v2/"), "else/where/v2/"),
    ],
)
def test_keys_lie_where_the_existing_tools_put_them(settings: Model, prefix: str, tmp_path: Path) -> None:
    assert key_prefix(settings, tiny_models.request(tmp_path, revision="r1")) == prefix


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("", ""),
        ("https://acc.r2.cloudflarestorage.com/", "https://acc.r2.cloudflarestorage.com"),
        ("acc.r2.cloudflarestorage.com", "https://acc.r2.cloudflarestorage.com"),
        ("http://10.0.0.1:9000", "http://10.0.0.1:9000"),
        ("http://[::1]:9000", "http://[::1]:9000"),
        ("minio:9000", "https://minio:9000"),
    ],
)
def test_an_endpoint_is_https_unless_it_says_otherwise(given: str, url: str) -> None:
    assert s3_store.endpoint_url(given) == url


@pytest.mark.parametrize(
    "given",
    ["ftp://x", "https://", "https://:9000", f"https://user:{SECRET}@store", f"user:{SECRET}@store", "https://store?x=1", "https://store:99999",
     "https://store:0", "https://a b", "https://store/\r\nX: y", "https://[::1", "http://store#x", "file:///etc/passwd"],
)  # fmt: skip
def test_what_is_no_endpoint_is_refused_and_not_shown(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        s3_store.endpoint_url(given)
    assert caught.value.code == "s3_endpoint"
    assert "R2_ENDPOINT_URL" in caught.value.what
    assert SECRET not in caught.value.what + caught.value.hint


@given(some.text(max_size=60))
def test_any_endpoint_is_taken_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        url = s3_store.endpoint_url(text)
        assert not url or url.startswith(("http://", "https://"))


@pytest.mark.parametrize(
    ("etag", "pin"),
    [('"abc-3"', "abc-3"), ("abc", "abc"), ('W/"abc"', ""), ('"a\r\nX: y"', ""), ('"é"', ""), (None, ""), ('""', ""), ('"', ""), ('"' + "a" * 201 + '"', "")],
)
def test_a_pin_is_what_an_if_match_can_carry(etag: object, pin: str) -> None:
    assert s3_listing._pin(etag) == pin


def test_an_etag_is_no_md5() -> None:
    files: list[RemoteFile] = []
    etag = "d41d8cd98f00b204e9800998ecf8427e"
    s3_listing.take({"Contents": [{"Key": "p/Tiny/a", "Size": 0, "ETag": f'"{etag}"'}]}, PLACE, files, set())
    assert [(file.pin, dict(file.sums)) for file in files] == [(etag, {})]


@pytest.mark.parametrize(
    ("head", "sums"),
    [
        ({"ChecksumCRC32": "SMrQyQ=="}, {"crc32": "48cad0c9"}),
        ({"ChecksumSHA256": "AAAA" * 10 + "AAA=", "ChecksumType": "FULL_OBJECT"}, {"sha256": "00" * 32}),
        ({"ChecksumCRC64NVME": "AAAAAAAAAAE=", "ChecksumType": "FULL_OBJECT"}, {"crc64nvme": "0000000000000001"}),
        ({"ChecksumSHA256": "AAAA" * 10 + "AAA=", "ChecksumType": "COMPOSITE"}, {}),
        ({"ChecksumSHA256": "AAAA" * 10 + "AAA=-3"}, {}),
        ({"ChecksumCRC32": "AAAA"}, {}),
        ({"ChecksumCRC32": "é"}, {}),
        ({"ChecksumCRC32": None}, {}),
        ({}, {}),
    ],
)
def test_only_sums_of_whole_objects_count(head: dict[str, object], sums: dict[str, str]) -> None:
    assert s3_transport.whole_sums(head) == sums


@pytest.mark.parametrize(
    ("status", "code", "kind", "hint"),
    [
        (403, "AccessDenied", PermissionMissing, "s3:GetObject"),
        (403, "InvalidAccessKeyId", PermissionMissing, "s3:GetObject"),
        (403, "SignatureDoesNotMatch", PermissionMissing, "s3:GetObject"),
        (400, "ExpiredToken", PermissionMissing, "s3:GetObject"),
        (400, "KMS.DisabledException", PermissionMissing, "s3:GetObject"),
        (401, "Unauthorized", PermissionMissing, "s3:GetObject"),
        (403, "403", PermissionMissing, "s3:GetObject"),
        (403, "RequestTimeTooSkewed", SourceUnavailable, "clock"),
        (404, "NoSuchBucket", ConfigError, "R2_BUCKET"),
        (301, "PermanentRedirect", ConfigError, "model.r2_region"),
        (400, "AuthorizationHeaderMalformed", ConfigError, "model.r2_region"),
        (503, "SlowDown", SourceUnavailable, "asked again"),
        (500, "InternalError", SourceUnavailable, "asked again"),
        (429, "429", SourceUnavailable, "asked again"),
        (400, "RequestTimeout", SourceUnavailable, "asked again"),
        (412, "PreconditionFailed", SourceUnavailable, "listed again"),
        (404, "NoSuchKey", SourceUnavailable, "listed again"),
        (403, "InvalidObjectState", ModelNotFound, "restore"),
        (400, "InvalidArgument", ConfigError, "endpoint"),
        (404, "404", ConfigError, "endpoint"),
    ],
)
def test_what_an_answer_means(status: int, code: str, kind: type[VllmdError], hint: str) -> None:
    error = s3_errors.of_answer(Answer(status, code, f"the message\n{SECRET}\x1b[31m"), PLACE)
    assert type(error) is kind
    assert code in error.what
    assert hint in error.hint
    assert "https://store.test" in error.what
    assert "the message" in error.what
    assert SECRET not in error.what
    assert error.what.isprintable()


def test_a_wrong_region_is_answered_with_the_right_one() -> None:
    error = s3_errors.of_answer(Answer(400, "AuthorizationHeaderMalformed", region="eu-west-3"), PLACE)
    assert error.hint == "Set model.r2_region (R2_REGION) to eu-west-3."


def test_without_credentials_it_is_said_where_they_go() -> None:
    place = Place("b", "p/", "https://store.test", s3_errors.ANONYMOUS)
    error = s3_errors.of_answer(Answer(403, "AccessDenied"), place)
    assert "asked with no credentials" in error.what
    assert "vllmd.s3-credentials" in error.hint


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"<Error><Code>NoSuchKey</Code><Message>a &lt;b&gt; c</Message></Error>", "NoSuchKey"),
        (b"<html>no</html>", "404"),
        (b"", "404"),
        (b"\xff\xfe<Code>A</Code>", "A"),
        (b"<Code>" + b"x" * 2000 + b"</Code>", "404"),
        (b" " * 20000 + b"<Code>late</Code>", "404"),
        (b'<!DOCTYPE a [<!ENTITY b "cc">]><Code>&b;</Code>', "&b;"),
    ],
)
def test_an_errors_body_is_read_without_a_parser(body: bytes, code: str) -> None:
    assert s3_errors.answer_of(404, body, "s3://a/b").code == code


@given(some.binary(max_size=300), some.integers(300, 599))
def test_any_body_of_an_error_is_read(body: bytes, status: int) -> None:
    error = s3_errors.of_answer(s3_errors.answer_of(status, b"<Code>" + body + b"</Code><Message>" + body + b"</Message>", "s3://a/b"), PLACE)
    assert error.what.isprintable()
    assert len(error.what) < 1000
