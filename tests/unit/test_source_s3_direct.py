"""The S3 source without botocore's client: its signatures are botocore's, and it steps back from whatever is not plain."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as some

from vllmd.config.settings import Model
from vllmd.models.sources import s3_direct
from vllmd.models.sources.s3_signature import Keys, signed

pytestmark = pytest.mark.unit

ENVIRON = {"AWS_ACCESS_KEY_ID": "AKIATESTING", "AWS_SECRET_ACCESS_KEY": "verysecret+/key", "HOME": "/nonexistent"}
SETTINGS: dict[str, Any] = {"r2_bucket": "models", "r2_endpoint_url": "https://store.test"}
PRINTABLE = some.text(some.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60)


@given(
    endpoint=some.sampled_from(["https://store.test", "https://store.test:443", "http://127.0.0.1:9000", "http://store.test:80", "https://store.test:8443"]),
    path=some.text(min_size=1, max_size=40).map(lambda text: quote(text.encode("utf-8", "replace"), safe="/~")),
    prefix=some.text(max_size=20).map(lambda text: quote(text.encode("utf-8", "replace"), safe="-_.~")),
    is_listing=some.booleans(),
    secret=PRINTABLE,
    token=some.just("") | PRINTABLE,
    region=some.sampled_from(["auto", "us-east-1", "weur"]),
    second=some.integers(0, 4_000_000_000),
)
def test_signatures_are_botocores(endpoint: str, path: str, prefix: str, is_listing: bool, secret: str, token: str, region: str, second: int) -> None:
    from botocore import auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    url = f"{endpoint}/models/{path}" + (f"?encoding-type=url&list-type=2&prefix={prefix}" if is_listing else "")
    asked = AWSRequest(method="GET", url=url)
    now = datetime.datetime.fromtimestamp(second, datetime.UTC)
    with mock.patch.object(auth, "get_current_datetime", return_value=now):
        auth.S3SigV4Auth(Credentials("AKIA", secret, token or None), "s3", region).add_auth(asked)
    made = signed(url, Keys("AKIA", secret, token), region, second)
    assert {name.lower(): value for name, value in made.items()} == {name.lower(): value for name, value in asked.headers.items()}


def transport(config: Path | None = None, *, environ: dict[str, str] | None = None, **settings: Any) -> s3_direct.DirectTransport | None:
    given_environ = ENVIRON | ({"AWS_CONFIG_FILE": str(config)} if config else {}) | (environ or {})
    return s3_direct._transport(Model(**{**SETTINGS, **settings}), "p/", given_environ)


def test_the_usual_case_is_taken() -> None:
    found = transport(environ={"AWS_REGION": "eu-1", "AWS_DEFAULT_REGION": "eu-2"})
    assert found is not None
    assert (found.region, found.bucket_url) == ("eu-1", "https://store.test/models")
    assert "verysecret" not in repr(found)
    assert transport(environ={"AWS_DEFAULT_REGION": "eu-2"}).region == "eu-2"  # type: ignore[union-attr]
    assert transport(r2_region="eu-3", environ={"AWS_REGION": "eu-1"}).region == "eu-3"  # type: ignore[union-attr]
    assert transport().region == "auto"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "environ",
    [
        {"AWS_ACCESS_KEY_ID": ""},
        {"AWS_SECRET_ACCESS_KEY": ""},
        {"AWS_SECRET_ACCESS_KEY": "a\nb"},
        {"AWS_PROFILE": "other"},
        {"AWS_ENDPOINT_URL": "https://other.test"},
        {"AWS_USE_DUALSTACK_ENDPOINT": "true"},
        {"AWS_CREDENTIAL_EXPIRATION": "2026-01-01T00:00:00Z"},
        {"BOTO_CONFIG": "/etc/boto.cfg"},
        {"AWS_CONFIG_FILE": "~/elsewhere"},
        {"AWS_REGION": "a region"},
    ],
)
def test_what_is_not_plain_in_the_environment_is_botocores(environ: dict[str, str]) -> None:
    assert transport(environ=environ) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"r2_bucket": "arn:aws:s3:us-west-2:1:accesspoint/a"},
        {"r2_bucket": "a--x-s3"},
        {"r2_bucket": "Upper"},
        {"r2_endpoint_url": ""},
        {"r2_endpoint_url": "store.test"},
        {"r2_endpoint_url": "https://s3.eu-west-1.amazonaws.com"},
        {"r2_endpoint_url": "https://user:password@store.test"},
        {"r2_endpoint_url": "https://store.test/path"},
        {"r2_endpoint_url": "https://[::1"},
    ],
)
def test_what_is_not_plain_in_the_settings_is_botocores(settings: dict[str, Any]) -> None:
    assert transport(**settings) is None


@pytest.mark.parametrize(
    ("text", "is_plain"),
    [
        ("", True),
        ("# words\n[default]\noutput = json\ns3 =\n  addressing_style = path\n  max_concurrent_requests = 16\n  multipart_chunksize = 16MB\n", True),
        ("[default]\nregion = eu-1\n", False),
        ("[default]\ns3 =\n  addressing_style = virtual\n", False),
        ("[default]\nca_bundle = /ca.pem\n", False),
        ("[default]\ncredential_process = /bin/keys\n", False),
        ("[profile a]\n", False),
        ("[default]\nendpoint_url = https://other.test\n", False),
        ("nonsense", False),
    ],
)
def test_a_configuration_of_the_aws_tools_that_says_something_is_botocores(text: str, is_plain: bool, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(text)
    assert (transport(config) is not None) == is_plain
