"""The downloader through TLS, proxies and IPv6, with the variables that people set for them."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.component.downloads import LIMITS, Plain, Ran, listing, noise
from tests.fakes.files_server import FilesServer, redirect, stall_after
from tests.fakes.forward_proxy import ForwardProxy
from vllmd.errors import ConfigError, PermissionMissing, SourceUnavailable

pytestmark = pytest.mark.component

FILES = {"config.json": b"{}", "model.safetensors": noise(3_000_000)}


@pytest.fixture
def ran(tmp_path: Path) -> Ran:
    return Ran(tmp_path / "store")


@pytest.fixture
def authority(tmp_path: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS for 127.0.0.1, and the certificate that vouches for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "private")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "authority.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    both = tmp_path / "both.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    both.write_bytes(private + path.read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return context, path


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_private_authority(ran: Ran, authority: tuple[ssl.SSLContext, Path], variable: str) -> None:
    with FilesServer(FILES, secure=authority[0]) as server:
        ran.fetch(listing(FILES), Plain(server.url), environ={variable: str(authority[1])})
    ran.check(FILES)


def test_authority_that_is_unknown_is_named_with_the_variable_and_not_asked_again(ran: Ran, authority: tuple[ssl.SSLContext, Path]) -> None:
    with FilesServer(FILES, secure=authority[0]) as server, pytest.raises(SourceUnavailable) as raised:
        ran.fetch(listing(FILES), Plain(server.url), replace(LIMITS, connections=1))
    assert raised.value.code == "certificate_refused"
    assert "127.0.0.1" in raised.value.what
    assert "SSL_CERT_FILE" in raised.value.hint
    assert "asking again" not in ran.log


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_bundle_that_is_none_names_its_variable(ran: Ran, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bundle.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="AWS_CA_BUNDLE"):
        ran.fetch(listing(FILES), Plain("https://127.0.0.1:1"), environ={"AWS_CA_BUNDLE": str(path)})


def test_encrypted_body_that_stalls_is_asked_anew(ran: Ran, authority: tuple[ssl.SSLContext, Path]) -> None:
    with FilesServer(FILES, secure=authority[0], script=[stall_after(500_000)]) as server:
        ran.fetch(listing(FILES), Plain(server.url), replace(LIMITS, stall_s=0.5, connections=1), {"SSL_CERT_FILE": str(authority[1])})
    ran.check(FILES)
    assert server.served["model.safetensors"] == len(FILES["model.safetensors"])


@pytest.mark.parametrize("encrypted", [False, True])
def test_all_that_came_counts_while_the_source_stands_still(ran: Ran, authority: tuple[ssl.SSLContext, Path], encrypted: bool) -> None:
    """A stop in that time would lose it, and a person would see a smaller number than there is."""
    with FilesServer(FILES, secure=authority[0] if encrypted else None, script=[stall_after(500_001)]) as server:
        only = {"model.safetensors": FILES["model.safetensors"]}
        ran.fetch(listing(only), Plain(server.url), replace(LIMITS, stall_s=2, connections=1), {"SSL_CERT_FILE": str(authority[1])})
    assert 500_001 in [progress.done_bytes for progress in ran.progress]


def test_redirect_from_https_to_http_is_refused(ran: Ran, authority: tuple[ssl.SSLContext, Path]) -> None:
    with FilesServer(FILES) as plain, FilesServer(FILES, secure=authority[0]) as server:
        server.rule = redirect(f"{plain.url}/config.json")
        with pytest.raises(SourceUnavailable) as raised:
            ran.fetch(listing(FILES), Plain(server.url), environ={"SSL_CERT_FILE": str(authority[1])})
    assert raised.value.code == "redirect_refused"
    assert plain.seen == []


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_http_through_a_proxy(ran: Ran, variable: str) -> None:
    with FilesServer(FILES) as server, ForwardProxy() as proxy:
        ran.fetch(listing(FILES), Plain(server.url), environ={variable: f"http://127.0.0.1:{proxy.port}"})
    ran.check(FILES)
    assert proxy.asked
    assert all(line.startswith(f"GET {server.url}/") for line in proxy.asked)


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY"])
def test_https_through_a_proxy_with_credentials(ran: Ran, authority: tuple[ssl.SSLContext, Path], variable: str) -> None:
    with FilesServer(FILES, secure=authority[0]) as server, ForwardProxy("Basic dXNlcjpwOnc=") as proxy:
        environ = {variable: f"http://user:p%3Aw@127.0.0.1:{proxy.port}", "SSL_CERT_FILE": str(authority[1])}
        ran.fetch(listing(FILES), Plain(server.url), environ=environ)
    ran.check(FILES)
    assert set(proxy.asked) == {f"CONNECT 127.0.0.1:{server.port} HTTP/1.1"}
    assert all("Proxy-Authorization" not in seen.headers for seen in server.seen)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_wants_credentials_says_so(ran: Ran, authority: tuple[ssl.SSLContext, Path], scheme: str) -> None:
    with ForwardProxy("Basic x") as proxy:
        environ = {f"{scheme}_proxy": f"http://127.0.0.1:{proxy.port}", "SSL_CERT_FILE": str(authority[1])}
        with pytest.raises(PermissionMissing) as raised:
            ran.fetch(listing(FILES), Plain(f"{scheme}://127.0.0.1:9"), environ=environ)
    assert "407" in raised.value.what


@pytest.mark.parametrize("exempt", ["127.0.0.1", "*", "127.0.0.0/8", "other, 127.0.0.1"])
def test_no_proxy(ran: Ran, exempt: str) -> None:
    with FilesServer(FILES) as server:
        ran.fetch(listing(FILES), Plain(server.url), environ={"http_proxy": "http://127.0.0.1:1", "NO_PROXY": exempt})
    ran.check(FILES)


def test_proxy_that_is_down_is_named(ran: Ran) -> None:
    with pytest.raises(SourceUnavailable, match=r"through the proxy 127\.0\.0\.1:1"):
        ran.fetch(listing(FILES), Plain("http://models.example"), environ={"http_proxy": "http://user:secret@127.0.0.1:1"})
    assert "secret" not in ran.log


@pytest.mark.parametrize("environ", [{"http_proxy": "http://"}, {"http_proxy": "socks5://h:1"}, {"http_proxy": "http://h:99999"}])
def test_proxy_that_is_none_names_its_variable(ran: Ran, environ: Mapping[str, str]) -> None:
    with pytest.raises(ConfigError, match="http_proxy"):
        ran.fetch(listing(FILES), Plain("http://127.0.0.1:1"), environ=environ)


def test_ipv6(ran: Ran) -> None:
    with FilesServer(FILES, host="::1") as server:
        ran.fetch(listing(FILES), Plain(server.url))
    ran.check(FILES)
    assert server.seen[0].headers["Host"] == f"[::1]:{server.port}"
