"""The downloader and redirects: loops, secrets that must not follow, places that expire; and servers that are none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.component.downloads import FILES, LIMITS, MODEL, Plain, Ran, listing
from tests.fakes.files_server import (
    Exchange,
    FilesServer,
    redirect,
    status,
)
from vllmd.errors import SourceUnavailable
from vllmd.models.transfer import work

pytestmark = pytest.mark.component


def test_redirect_loop_is_an_error(ran: Ran) -> None:
    with FilesServer(FILES) as server:
        server.rule = redirect(f"{server.url}/{MODEL}")
        with pytest.raises(SourceUnavailable) as raised:
            ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
    assert raised.value.code == "redirect_loop"


def test_too_many_redirects_are_an_error(ran: Ran) -> None:
    count = [0]

    def on(exchange: Exchange) -> bool:
        count[0] += 1
        exchange.reply(302, b"", {"Location": f"/hop{count[0]}"})
        return True

    with FilesServer(FILES, rule=on) as server, pytest.raises(SourceUnavailable) as raised:
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
    assert raised.value.code == "redirect_loop"
    assert count[0] == 6


def test_redirect_to_another_host_gets_no_secret_and_is_remembered(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MIN_PART_BYTES", 1 << 20)
    files = {MODEL: FILES[MODEL]}
    secrets = {"Authorization": "Bearer hf_secret", "X-Amz-Security-Token": "secret", "Cookie": "a=secret", "If-Match": '"x"'}
    with FilesServer(files) as other, FilesServer(files) as server:
        server.rule = redirect(f"{other.url}/{MODEL}?signature=secret")
        ran.fetch(listing(files), Plain(server.url, secrets), replace(LIMITS, connections=1))
    ran.check(files)
    assert all(seen.headers["Authorization"] == "Bearer hf_secret" for seen in server.seen)
    assert other.seen
    for seen in other.seen:
        assert {name.lower() for name in seen.headers} == {"host", "accept-encoding", "range"}
    assert len(server.seen) == 1
    assert len(other.seen) > 1
    assert "secret" not in ran.log


def test_redirected_place_that_expired_is_asked_of_the_source_again(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MIN_PART_BYTES", 1 << 20)
    files = {MODEL: FILES[MODEL]}
    with FilesServer(files, script=[None, status(403)]) as other, FilesServer(files) as server:
        server.script = [redirect(f"{other.url}/{MODEL}?signature=x")]
        ran.fetch(listing(files), Plain(server.url), replace(LIMITS, connections=1))
    ran.check(files)
    assert len(other.seen) == 2  # refused once, it is not asked any more
    assert len(server.seen) == 3


def test_refusal_of_a_place_just_redirected_to_is_asked_again(ran: Ran) -> None:
    files = {MODEL: FILES[MODEL]}
    with FilesServer(files, script=[status(403)]) as other, FilesServer(files) as server:
        server.rule = redirect(f"{other.url}/{MODEL}?signature=x")
        ran.fetch(listing(files), Plain(server.url), replace(LIMITS, connections=1))
    ran.check(files)
    with FilesServer(files, script=[status(403)] * 50) as other, FilesServer(files) as server:
        server.rule = redirect(f"{other.url}/{MODEL}?signature=x")
        with pytest.raises(SourceUnavailable) as raised:
            ran.fetch(listing({"other": files[MODEL]}), Plain(server.url), replace(LIMITS, connections=1))
    assert "403" in raised.value.what


def test_redirect_on_the_same_host_keeps_the_headers(ran: Ran) -> None:
    files = {MODEL: FILES[MODEL]}
    with FilesServer(files, script=[redirect(f"/{MODEL}?again")]) as server:
        ran.fetch(listing(files), Plain(server.url, {"Authorization": "Bearer t"}))
    ran.check(files)
    assert [seen.headers.get("Authorization") for seen in server.seen] == ["Bearer t"] * 2


@pytest.mark.parametrize("where", ["http://127.0.0.1:1", "http://no-such-host.invalid"])
def test_host_that_cannot_be_reached_is_named(ran: Ran, where: str) -> None:
    with pytest.raises(SourceUnavailable) as raised:
        ran.fetch(listing(FILES), Plain(where))
    assert where.removeprefix("http://") in raised.value.what


def test_what_does_not_speak_http_is_said(ran: Ran) -> None:
    def garble(exchange: Exchange) -> bool:
        exchange.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        exchange.drop()
        return True

    with FilesServer(FILES, rule=garble) as server, pytest.raises(SourceUnavailable, match="HTTP"):
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))


def test_endless_head_is_cut_off(ran: Ran) -> None:
    def endless(exchange: Exchange) -> bool:
        exchange.wfile.write(b"HTTP/1.1 200 OK\r\n")
        try:
            while not exchange.owner.closing.is_set():
                exchange.wfile.write(b"X-Filler: " + b"x" * 60000 + b"\r\n")
        except OSError:
            exchange.close_connection = True
        return True

    with FilesServer(FILES, rule=endless) as server, pytest.raises(SourceUnavailable, match="HTTP"):
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
