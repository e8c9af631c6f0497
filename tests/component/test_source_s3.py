"""The S3 source against moto's server: what is found, and requests that a store accepts."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from vllmd.config.settings import Model
from vllmd.errors import ConfigError, PermissionMissing, SourceUnavailable
from vllmd.models.remote import RemoteFile, known_sums
from vllmd.models.sources import Context, NotFound, Offered, s3_direct
from vllmd.models.sources.s3 import S3

pytestmark = pytest.mark.component

KEYS = ("config.json", "a b+c%25&=?#.txt", "日本.txt", "sub/dir/x.bin", "../evil", "/abs", "a%2Fb", "~a'b(c)!*", "{\\}")
KEY, SECRET = "AKIATESTING", "verysecret+/key"


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy") or name == "CREDENTIALS_DIRECTORY":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture(autouse=True, params=["direct", "botocore"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to ask a store say the same."""
    if request.param == "botocore":
        monkeypatch.setattr(s3_direct, "asked", lambda *_: None)
    return str(request.param)


@pytest.fixture
def bucket(moto: str) -> Iterator[Any]:
    """Empty, and only this test's."""
    from botocore.session import Session

    client = Session().create_client("s3", endpoint_url=moto, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET)
    client.create_bucket(Bucket="models")
    yield client
    client.close()
    urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", method="POST"), timeout=20).close()


def find(url: str, **settings: Any) -> Any:
    context = Context(Model(**{"r2_bucket": "models", "r2_models_prefix": "p", "r2_endpoint_url": url, **settings}), dict(os.environ))
    return S3().find(tiny_models.request(Path("/nowhere"), "acme/Tiny"), context)


def get(offered: Offered, file: RemoteFile, begin: int, end: int) -> bytes:
    request = offered.transport.request(file, begin, end)
    with urllib.request.urlopen(urllib.request.Request(request.url, headers=dict(request.headers)), timeout=20) as answer:
        content: bytes = answer.read()
    return content


def refusal(offered: Offered, file: RemoteFile) -> tuple[int, bytes]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(offered, file, 0, 5)
    with caught.value as error:
        return error.code, error.read()


def close(offered: Offered) -> None:
    offered.transport.store.sender.close()  # type: ignore[attr-defined]


def test_every_key_is_listed_and_fetched_as_it_is(moto: str, bucket: Any) -> None:
    bodies = {key: key.encode() * 20 for key in KEYS}
    for key, body in bodies.items():
        bucket.put_object(Bucket="models", Key=f"p/Tiny/{key}", Body=body)
    bucket.put_object(Bucket="models", Key="p/Tiny/", Body=b"")
    bucket.put_object(Bucket="models", Key="p/Tiny/sub/", Body=b"")
    bucket.put_object(Bucket="models", Key="p/Tinyer/no", Body=b"other model")
    offered = find(moto)
    assert offered.listing.origin == "s3://models/p/Tiny/"
    assert {file.name: file.size for file in offered.listing.files} == {key: len(body) for key, body in bodies.items()}
    for file in offered.listing.files:
        body = bodies[file.name]
        theirs = bucket.generate_presigned_url("get_object", {"Bucket": "models", "Key": file.key}).partition("?")[0]
        assert offered.transport.request(file, 0, 1).url == theirs
        assert get(offered, file, 0, file.size) == body
        assert get(offered, file, 3, 11) == body[3:11]


def test_an_empty_object_is_asked_for_without_a_range(moto: str, bucket: Any) -> None:
    bucket.put_object(Bucket="models", Key="p/Tiny/empty", Body=b"")
    offered = find(moto)
    assert get(offered, offered.listing.files[0], 0, 0) == b""


def test_a_replaced_object_is_refused_and_worth_listing_again(moto: str, bucket: Any) -> None:
    bucket.put_object(Bucket="models", Key="p/Tiny/a", Body=b"one" * 9)
    offered = find(moto)
    [file] = offered.listing.files
    bucket.put_object(Bucket="models", Key="p/Tiny/a", Body=b"two" * 9)
    status, body = refusal(offered, file)
    error = offered.transport.refused(file, status, body)
    assert isinstance(error, SourceUnavailable)
    assert "s3://models/p/Tiny/a" in error.what
    assert "412" in error.what or "PreconditionFailed" in error.what


@pytest.mark.parametrize("status", [403, 404])
def test_words_that_are_not_the_stores_are_left_to_the_general_ones(moto: str, bucket: Any, status: int) -> None:
    bucket.put_object(Bucket="models", Key="p/Tiny/a", Body=b"one")
    offered = find(moto)
    error = offered.transport.refused(offered.listing.files[0], status, b"<html>a proxy</html>")
    assert isinstance(error, PermissionMissing) if status == 403 else error is None


def test_nothing_there(moto: str, bucket: Any) -> None:
    assert find(moto) == NotFound("nothing in s3://models/p/Tiny/")


def test_another_prefix_in_place_of_the_usual(moto: str, bucket: Any) -> None:
    bucket.put_object(Bucket="models", Key="releases/7/config.json", Body=b"{}")
    offered = find(moto, r2_object_prefix="releases/7")
    assert [file.name for file in offered.listing.files] == ["config.json"]


def test_no_such_bucket_is_a_wrong_setting(moto: str, bucket: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        find(moto, r2_bucket="modles")
    assert "bucket modles" in caught.value.what
    assert "NoSuchBucket" in caught.value.what


def test_checksums_of_the_store_as_hex(moto: str, bucket: Any) -> None:
    body = b"weights" * 1000
    bucket.put_object(Bucket="models", Key="p/Tiny/a", Body=body, ChecksumAlgorithm="SHA256")
    offered = find(moto)
    [file] = offered.listing.files
    assert dict(file.sums) == {}, "asking for them must wait until they are needed"
    assert known_sums(offered.transport, file) == {"sha256": hashlib.sha256(body).hexdigest()}
    bucket.delete_object(Bucket="models", Key="p/Tiny/a")
    assert known_sums(offered.transport, file) == {}
    close(offered)


def test_a_store_that_checks_signatures_accepts_ours(moto: str, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.session import Session
    from moto import settings
    from moto.core.authorization import ActionAuthenticatorMixin

    for key in KEYS:
        bucket.put_object(Bucket="models", Key=f"p/Tiny/{key}", Body=b"0123456789")
    iam = Session().create_client("iam", endpoint_url=moto, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET)
    iam.create_user(UserName="reader")
    policy = '{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject"], "Resource": "*"}}'
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    iam.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    monkeypatch.setattr(ActionAuthenticatorMixin, "request_count", 0)
    offered = find(moto)
    assert len(offered.listing.files) == len(KEYS)
    for file in offered.listing.files:
        assert get(offered, file, 2, 5) == b"234"
    status, body = refusal(offered, replace(offered.listing.files[0], key="p/Tiny/nothing"))
    assert b"NoSuchKey" in body
    offered.transport.store.credentials.secret_key = "wrong"
    status, body = refusal(offered, offered.listing.files[0])
    assert (status, b"SignatureDoesNotMatch" in body) == (403, True)
    assert isinstance(offered.transport.refused(offered.listing.files[0], status, body), PermissionMissing)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"][::-1])  # one of 64 ends with any letter that could be put there
    with pytest.raises(PermissionMissing, match="SignatureDoesNotMatch") as caught:
        find(moto)
    assert "the keys in AWS_ACCESS_KEY_ID" in caught.value.what
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODY")
    with pytest.raises(PermissionMissing, match="InvalidAccessKeyId"):
        find(moto)
