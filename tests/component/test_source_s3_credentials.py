"""As whom the S3 source asks: the usual chain, systemd's credential, nobody."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.component.test_source_s3 import environ, find
from tests.fakes.s3_server import Asked, Reply, S3Server, error, item, listing
from vllmd.errors import ConfigError, PermissionMissing, VllmdError
from vllmd.models.sources import s3_store

pytestmark = [pytest.mark.component, pytest.mark.usefixtures("environ")]

__all__ = ["environ"]

FILE = item("p/Tiny/config.json")


def keys(key: str, section: str = "default") -> str:
    return f"[{section}]\naws_access_key_id = {key}\naws_secret_access_key = verysecret-{key}\n"


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where systemd puts it."""
    (tmp_path / "credentials").mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    return tmp_path / "credentials/s3-credentials"


def accepting(_asked: Asked) -> Reply:
    return listing(FILE)


def refusing(_asked: Asked) -> Reply:
    return error(403, "AccessDenied")


def asked_as() -> str:
    with S3Server(accepting) as server:
        offered = find(server.url)
    request = offered.transport.request(offered.listing.files[0], 0, 3)
    assert server.asked[0].access_key in request.headers.get("Authorization", "")
    assert "verysecret" not in repr(offered)
    return server.asked[0].access_key


def refusal() -> VllmdError:
    with S3Server(refusing) as server, pytest.raises(VllmdError) as caught:
        find(server.url)
    assert "verysecret" not in caught.value.what + caught.value.hint
    return caught.value


@pytest.mark.usefixtures("nobody")
def test_without_credentials_the_store_is_asked_anonymously_and_at_once() -> None:
    began = time.monotonic()
    with S3Server(accepting) as server:
        offered = find(server.url)
    assert time.monotonic() - began < 5, "instance metadata, which nobody serves here, must not be waited for"
    assert server.asked[0].authorization == ""
    request = offered.transport.request(offered.listing.files[0], 0, 3)
    assert "Authorization" not in request.headers
    assert request.headers["Range"] == "bytes=0-2"
    assert request.headers["If-Match"] == '"abc"'


@pytest.mark.usefixtures("nobody")
def test_an_anonymous_reader_is_told_where_credentials_go() -> None:
    found = refusal()
    assert isinstance(found, PermissionMissing)
    assert "asked with no credentials" in found.what
    assert "vllmd.s3-credentials" in found.hint


@pytest.mark.usefixtures("nobody")
def test_the_credential_of_systemd(credential: Path, tmp_path: Path) -> None:
    (tmp_path / "home/.aws").mkdir(parents=True)
    (tmp_path / "home/.aws/credentials").write_text(keys("AKIAHOME"))
    credential.write_text(keys("AKIASYSTEMD"))
    assert asked_as() == "AKIASYSTEMD"
    assert "asked with the systemd credential s3-credentials" in refusal().what
    credential.unlink()
    assert asked_as() == "AKIAHOME"
    assert "asked with the shared credentials file" in refusal().what


@pytest.mark.usefixtures("nobody")
def test_a_profile_of_it(credential: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credential.write_text(keys("AKIADEFAULT") + keys("AKIAOTHER", "other") + "aws_session_token = verysecret-token\n")
    monkeypatch.setenv("AWS_PROFILE", "other")
    with S3Server(accepting) as server:
        offered = find(server.url)
    assert server.asked[0].access_key == "AKIAOTHER"
    assert server.asked[0].headers["x-amz-security-token"] == "verysecret-token"
    assert offered.transport.request(offered.listing.files[0], 0, 3).headers["X-Amz-Security-Token"] == "verysecret-token"
    assert "profile other" in refusal().what
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(ConfigError, match="absent"):
        find("http://127.0.0.1:9")


def test_keys_in_the_environment_come_first(credential: Path) -> None:
    credential.write_text(keys("AKIASYSTEMD"))
    assert asked_as() == "AKIATESTING"


@pytest.mark.usefixtures("nobody")
def test_a_file_that_the_environment_names_comes_before_it(credential: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credential.write_text(keys("AKIASYSTEMD"))
    (tmp_path / "named").write_text(keys("AKIANAMED"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "named"))
    assert asked_as() == "AKIANAMED"


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("content", ["verysecret\nverysecret\n", "[default]\naws_access_key_id = AKIAHALF\n", "[default\nverysecret"])
def test_a_credential_that_is_none_is_said_without_showing_it(credential: Path, content: str) -> None:
    credential.write_text(content)
    found = refusal()
    assert isinstance(found, ConfigError | PermissionMissing)
    assert found.code in ("s3_settings", "s3_credentials")
    assert "verysecret" not in found.what


@pytest.mark.usefixtures("nobody")
def test_a_process_that_gives_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"Version": 1, "AccessKeyId": "AKIAPROCESS", "SecretAccessKey": "verysecret"})
    (tmp_path / "config").write_text(f"[default]\ncredential_process = /bin/echo '{answer}'\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert asked_as() == "AKIAPROCESS"
    (tmp_path / "config").write_text("[default]\ncredential_process = /bin/false\n")
    with pytest.raises(PermissionMissing) as caught:
        find("http://127.0.0.1:9")
    assert caught.value.code == "s3_credentials"


@pytest.mark.usefixtures("nobody")
def test_the_role_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"AccessKeyId": "AKIAROLE", "SecretAccessKey": "verysecret", "Token": "t", "Expiration": "2099-01-01T00:00:00Z"}
    with S3Server(lambda _asked: Reply(200, json.dumps(answer).encode())) as metadata:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{metadata.url}/role")
        assert asked_as() == "AKIAROLE"


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("is_there", [True, False])
def test_the_role_of_an_instance(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"Code": "Success", "AccessKeyId": "AKIAINSTANCE", "SecretAccessKey": "verysecret", "Token": "t", "Expiration": "2099-01-01T00:00:00Z"}

    def script(asked: Asked) -> Reply:
        if asked.path.endswith("/api/token"):
            return Reply(200, b"token")
        return Reply(200, json.dumps(answer).encode() if asked.path.endswith("/reader") else b"reader")

    with S3Server(script) as metadata:
        if is_there:
            monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
        else:
            monkeypatch.setattr(s3_store, "_is_ec2", lambda: False)
        assert asked_as() == ("AKIAINSTANCE" if is_there else "")


@pytest.mark.usefixtures("nobody")
def test_elsewhere_instance_metadata_is_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint in a file is botocore's business only if it asks at all."""
    monkeypatch.setattr(s3_store, "_is_ec2", lambda: False)
    with S3Server(lambda _asked: Reply(500)) as metadata:
        (tmp_path / "config").write_text(f"[default]\nec2_metadata_service_endpoint = {metadata.url}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        assert asked_as() == ""
        assert metadata.asked == []
        monkeypatch.setattr(s3_store, "_is_ec2", lambda: True)
        assert asked_as() == ""
        assert metadata.asked
