"""What the hub source makes of a hub that refuses, fails, or is none: with the real huggingface_hub, and never with the token in it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests import tiny_models
from tests.fakes.hub import Asked, FakeHub, Reply, page, refusal
from vllmd.config.settings import Model
from vllmd.errors import ConfigError, ModelInvalid, PermissionMissing, SourceUnavailable, VllmdError
from vllmd.models.download import Limits, download
from vllmd.models.sources import Context, NotFound, Offered, hub_client, hub_listing
from vllmd.models.sources.hf_hub import Hub
from vllmd.models.stage import Stage

pytestmark = [pytest.mark.component, pytest.mark.usefixtures("bare_home")]

TOKEN, BAD = "hf_good", "hf_verybadtoken"
COMMIT = "a" * 40
FILES = {"config.json": b"{}", "model.safetensors": b"x" * 1000}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub({"acme/Tiny": FILES, "acme/Private": FILES, "acme/Gated": FILES}, token=TOKEN, gated=["acme/Gated"], private=["acme/Private"]) as made:
        yield made


def find(url: str, model_id: str = "acme/Tiny", revision: str = "", **settings: Any) -> Any:
    context = Context(Model(**{"hf_endpoint": url, **settings}), dict(os.environ))
    return Hub().find(tiny_models.request(Path("/nowhere"), model_id, revision=revision), context)


def failure(kind: type[VllmdError], url: str, *args: str, **settings: Any) -> VllmdError:
    with pytest.raises(kind) as caught:
        find(url, *args, **settings)
    assert type(caught.value) is kind
    check_secret(caught.value)
    return caught.value


def check_secret(error: VllmdError) -> None:
    shown = f"{error.what} {error.hint}"
    assert TOKEN not in shown
    assert BAD not in shown
    assert len(error.what) < 1000
    assert "\n" not in shown


def answering(hub: FakeHub, reply: Reply | Callable[[Asked], Reply]) -> str:
    hub.script = lambda asked: reply(asked) if callable(reply) else reply
    return hub.url


def fetch(offered: Offered, store: Path) -> VllmdError:
    stage = Stage.open(store, "m", offered.listing)
    limits = Limits(connections=2, stall_s=5, attempts=2, back_off_s=0.01)
    with pytest.raises(VllmdError) as caught:
        download(offered.listing, offered.transport, stage, limits, dict(os.environ), lambda _: None, lambda _: None)
    check_secret(caught.value)
    return caught.value


def test_missing_and_private_repositories_are_told_with_what_could_help(hub: FakeHub) -> None:
    for model_id in ("acme/Missing", "acme/Private"):
        finding = find(hub.url, model_id)
        assert isinstance(finding, NotFound)
        assert "no such repository, or it is private: set HF_TOKEN" in finding.reason
    with_token = find(hub.url, "acme/Missing", hf_token=TOKEN)
    assert isinstance(with_token, NotFound)
    assert "may the token from HF_TOKEN read it?" in with_token.reason
    assert isinstance(find(hub.url, "acme/Private", hf_token=TOKEN), Offered)


def test_a_bad_token_is_said_to_be_bad(hub: FakeHub) -> None:
    error = failure(PermissionMissing, hub.url, hf_token=BAD)
    assert error.code == "hub_token_refused"
    assert "the token from HF_TOKEN" in error.what
    assert f"{hub.url}/settings/tokens" in error.hint


def test_a_gated_model_without_a_token(hub: FakeHub, tmp_path: Path) -> None:
    error = fetch(find(hub.url, "acme/Gated"), tmp_path)
    assert (error.code, error.status) == ("hub_gated", 77)
    for needed in (f"{hub.url}/acme/Gated", "settings/tokens", "hf-token", "HF_TOKEN"):
        assert needed in error.hint


def test_a_gated_model_whose_licence_this_account_did_not_accept(hub: FakeHub, tmp_path: Path) -> None:
    offered = find(hub.url, "acme/Gated", hf_token=TOKEN)
    said = "Access to model acme/Gated is restricted and you are not in the authorized list."
    hub.script = lambda asked: refusal(403, "GatedRepo", said) if "/resolve/" in asked.path else None
    error = fetch(offered, tmp_path)
    assert (error.code, error.status) == ("hub_gated", 77)
    assert f"Accept the licence at {hub.url}/acme/Gated with the account of the token (HF_TOKEN)" in error.hint


def test_a_gated_listing_is_told_too(hub: FakeHub) -> None:
    url = answering(hub, refusal(403, "GatedRepo", "Access to model acme/Tiny is restricted"))
    assert failure(PermissionMissing, url, hf_token=TOKEN).code == "hub_gated"


def test_a_file_that_is_gone_is_listed_again_by_the_next_attempt(hub: FakeHub, tmp_path: Path) -> None:
    offered = find(hub.url)
    hub.script = lambda asked: refusal(404, "EntryNotFound", "Entry not found") if "/resolve/" in asked.path else None
    error = fetch(offered, tmp_path)
    assert isinstance(error, SourceUnavailable)
    assert error.code == "source_changed"


def test_a_token_that_a_hub_echoes_is_not_shown(hub: FakeHub) -> None:
    said = f"your token {BAD} is odd" + "\t" + "x" * 5000
    assert "[redacted]" in failure(PermissionMissing, answering(hub, refusal(403, "", said)), hf_token=BAD).what


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (429, SourceUnavailable, "source_busy"),
        (408, SourceUnavailable, "source_busy"),
        (500, SourceUnavailable, "source_busy"),
        (503, SourceUnavailable, "source_busy"),
        (407, PermissionMissing, "proxy_refused"),
        (451, PermissionMissing, "hub_disabled"),
        (403, PermissionMissing, "hub_refused"),
    ],
)
def test_other_refusals(hub: FakeHub, status: int, kind: type[VllmdError], code: str) -> None:
    error = failure(kind, answering(hub, refusal(status, "", "said the hub", Retry_After="120")))
    assert error.code == code
    assert len(hub.asked) == 1  # who asks again is the resolve stage
    assert ("120 s" in error.what) == (code == "source_busy")


def test_a_path_that_no_hub_has(hub: FakeHub) -> None:
    finding = find(hub.url + "/not/here")
    assert isinstance(finding, NotFound)
    assert "HF_ENDPOINT" in finding.reason


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Sign in to the guest network</html>",
        b"",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"id": 1}',
        b'{"id": "acme/Tiny", "sha": null, "siblings": []}',
        b'{"id": "acme/Tiny", "sha": "../../x", "siblings": []}',
        json.dumps({"id": "x", "sha": COMMIT}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": "many"}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": [{"name": "x"}]}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": [{"rfilename": "x"}]}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": [{"rfilename": 1, "size": 1, "blobId": COMMIT}]}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": [{"rfilename": "x", "size": 1.5, "blobId": COMMIT}]}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": [{"rfilename": "x", "size": True, "blobId": COMMIT}]}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": [{"rfilename": "x", "size": 1, "blobId": "no"}]}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": [{"rfilename": "x", "size": 1, "lfs": {"sha256": "no", "size": 1, "pointerSize": 1}}]}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": [{"rfilename": "x", "size": 1, "lfs": 7}]}).encode(),
        json.dumps({"id": "x", "sha": COMMIT, "siblings": [], "safetensors": {"odd": 1}}).encode(),
        b'{"id": "\xff\xfe"',
    ],
)
def test_answers_that_are_no_listing(hub: FakeHub, body: bytes) -> None:
    error = failure(SourceUnavailable, answering(hub, Reply(200, body)))
    assert error.code == "source_unreadable"
    assert "HF_ENDPOINT" in error.hint


def test_a_mirror_that_lists_another_commit_than_the_asked_one(hub: FakeHub) -> None:
    url = answering(hub, page({"id": "acme/Tiny", "sha": COMMIT, "siblings": []}))
    assert "instead of" in failure(SourceUnavailable, url, "acme/Tiny", "b" * 40).what


def test_more_files_than_a_listing_can_have(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_listing, "MAX_FILES", 1)
    assert failure(ModelInvalid, hub.url).code == "model_unsafe"


def test_an_answer_without_end(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "MAX_ANSWER_BYTES", 1 << 20)

    def endless(asked: Asked) -> Reply:
        return Reply(200, (b" " * 65536 for _ in range(1 << 14)), {"Content-Type": "application/json"})

    assert "longer than" in failure(SourceUnavailable, answering(hub, endless)).what


def test_a_redirect_without_end_of_its_body(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "MAX_ANSWER_BYTES", 1 << 20)

    def endless(asked: Asked) -> Reply:
        return Reply(307, (b" " * 65536 for _ in range(1 << 14)), {"Location": "/elsewhere"})

    assert "longer than" in failure(SourceUnavailable, answering(hub, endless)).what


def test_an_answer_that_trickles(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "ANSWER_S", 0.3)

    def trickle(asked: Asked) -> Reply:
        def parts() -> Iterator[bytes]:
            while not hub.closing.wait(0.02):
                yield b" "

        return Reply(200, parts())

    assert "not complete" in failure(SourceUnavailable, answering(hub, trickle)).what


def test_a_hub_that_says_nothing(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "TIMEOUT_S", 0.3)
    assert failure(SourceUnavailable, answering(hub, Reply(200, hub.stalled()))).code == "source_unreachable"


def test_a_compressed_answer_is_not_unpacked(hub: FakeHub) -> None:
    assert hub_client.MAX_ANSWER_BYTES
    error = failure(SourceUnavailable, answering(hub, Reply(200, b"\x1f\x8b" + b"\0" * 100, {"Content-Encoding": "gzip"})))
    assert "compressed" in error.what


def test_a_redirect_to_a_stranger_does_not_tell_the_token(hub: FakeHub) -> None:
    hub.script = lambda asked: Reply(307, b"", {"Location": f"{hub.cdn_url}{asked.target}"}) if asked.server == "hub" else refusal(500, "", "x")
    failure(SourceUnavailable, hub.url, hf_token=TOKEN)
    assert [asked.server for asked in hub.asked] == ["hub", "cdn"]
    assert hub.tokens_seen("cdn") == set()


def test_a_renamed_repository_is_followed(hub: FakeHub) -> None:
    old, new = "/api/models/acme/Old", "/api/models/acme/Tiny"
    hub.script = lambda asked: Reply(307, b"", {"Location": asked.target.replace(old, new)}) if old in asked.path else None
    assert find(hub.url, "acme/Old", hf_token=TOKEN).listing.revision == hub.commit("acme/Tiny")


def test_a_redirect_that_goes_in_circles(hub: FakeHub) -> None:
    assert failure(SourceUnavailable, answering(hub, lambda asked: Reply(307, b"", {"Location": asked.target}))).code == "redirect_loop"


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert failure(SourceUnavailable, f"http://127.0.0.1:{free.getsockname()[1]}").code == "source_unreachable"
    assert failure(SourceUnavailable, "http://no.such.host.invalid").code == "source_unreachable"


def test_a_connection_that_is_cut_in_the_head() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def cut() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 O")
            connection.close()

        thread = threading.Thread(target=cut)
        thread.start()
        assert failure(SourceUnavailable, f"http://127.0.0.1:{server.getsockname()[1]}").code == "source_unreachable"
        thread.join()


@pytest.mark.parametrize("endpoint", ["ftp://hub", "https://user:hf_verybadtoken@hub", "https://", "https://hub?x=hf_verybadtoken", "https://a b", "https://h:99999"])
def test_endpoints_that_are_none(endpoint: str) -> None:
    assert failure(ConfigError, endpoint).code == "hub_endpoint"


def test_a_proxy_of_the_environment_is_used_and_its_refusal_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", hub.url)
    error = failure(PermissionMissing, answering_at(hub, refusal(407, "", "who are you")), hf_token=TOKEN)
    assert error.code == "proxy_refused"
    assert hub.asked[0].target.startswith("http://hub.example/")


def test_a_token_is_not_sent_in_clear_text_to_another_host(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", hub.url)
    finding = find(answering_at(hub, refusal(401, "RepoNotFound", "Invalid username or password.")), hf_token=TOKEN)
    assert hub.asked[0].authorization == ""
    assert isinstance(finding, NotFound)
    assert "not sent over plain http" in finding.reason


def answering_at(hub: FakeHub, reply: Reply) -> str:
    answering(hub, reply)
    return "http://hub.example"


def test_a_bundle_of_certificates_that_cannot_be_read(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent/ca.pem")
    assert failure(ConfigError, hub.url).code == "ca_bundle_unusable"


def test_a_mirror_with_a_certificate_of_its_own(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = _certificate(tmp_path / "server.pem")
    with FakeHub({"acme/Tiny": FILES}, certificate=certificate) as secure:
        assert secure.url.startswith("https://")
        error = failure(SourceUnavailable, secure.url, hf_token=TOKEN)
        assert error.code == "certificate_refused"
        assert "SSL_CERT_FILE" in error.hint
        assert secure.asked == []
        for variable in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
            with monkeypatch.context() as patch:
                patch.setenv(variable, str(certificate))
                assert isinstance(find(secure.url, hf_token=TOKEN), Offered)


def test_host_without_certificate_authorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ca-certificates is not installed: the words of OpenSSL alone are a riddle."""
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_FILE", "")
    with FakeHub({"acme/Tiny": FILES}, certificate=_certificate(tmp_path / "server.pem")) as secure:
        error = failure(SourceUnavailable, secure.url)
    assert error.code == "no_certificates"
    assert "ca-certificates" in error.what


def _certificate(path: Path) -> Path:
    """Signed by itself, for 127.0.0.1; the key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hub")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path
