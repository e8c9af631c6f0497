"""The S3 source over TLS: only to whom the certificates say it is."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.component.test_source_s3 import environ, find
from tests.fakes.s3_server import S3Server, item, listing
from vllmd.errors import ConfigError, SourceUnavailable

pytestmark = [pytest.mark.component, pytest.mark.usefixtures("environ")]

__all__ = ["environ"]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """For 127.0.0.1, signed by nobody, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - datetime.timedelta(1), now + datetime.timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    path = tmp_path / "store.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def test_a_store_that_nobody_vouches_for(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(lambda _asked: listing(item("p/Tiny/config.json")), certificate) as server:
        with pytest.raises(SourceUnavailable) as caught:
            find(server.url)
        assert caught.value.code == "tls_refused"
        assert "AWS_CA_BUNDLE" in caught.value.hint
        assert server.asked == []
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        assert find(server.url).listing.files
        assert find(server.url.removeprefix("https://")).listing.files, "https is what an endpoint without a scheme means"


def test_a_bundle_that_is_not_there(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere/ca.pem")
    with S3Server(lambda _asked: listing(), certificate) as server, pytest.raises(ConfigError, match="/nowhere/ca"):
        find(server.url)
