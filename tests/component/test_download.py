"""The downloader against a real server that misbehaves: what arrives is what was listed, or the error says what did not."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from email.utils import formatdate

import pytest

from tests.component.downloads import FILES, LIMITS, MODEL, Plain, Ran, listing, noise
from tests.fakes.files_server import (
    Behaviour,
    Exchange,
    FilesServer,
    chunked,
    cut_after,
    no_ranges,
    stall_after,
    status,
)
from vllmd.errors import ModelNotFound, PermissionMissing, SourceUnavailable
from vllmd.models.download import download
from vllmd.models.remote import RemoteFile, Request
from vllmd.models.stage import Stage
from vllmd.models.transfer import work

pytestmark = pytest.mark.component


def test_all_files_with_both_sums_and_progress(ran: Ran) -> None:
    with FilesServer(FILES) as server:
        ran.fetch(listing(FILES), Plain(server.url))
    ran.check(FILES)
    assert all(len(digest.blake3) == 64 for digest in ran.digests.values())
    total = sum(map(len, FILES.values()))
    assert (ran.progress[-1].done_bytes, ran.progress[-1].total_bytes) == (total, total)
    assert ran.progress[-1].phase == "fetch"
    assert server.served[MODEL] == len(FILES[MODEL])
    assert "empty" not in server.served


def test_large_file_comes_in_parts_over_several_connections(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MIN_PART_BYTES", 2 << 20)
    monkeypatch.setattr(work, "MAX_PART_BYTES", 4 << 20)
    files = {"big": noise(40_000_000)}
    with FilesServer(files) as server:
        ran.fetch(listing(files), Plain(server.url))
    ran.check(files)
    assert len({seen.client for seen in server.seen}) > 1
    assert len({seen.headers["Range"] for seen in server.seen}) >= 10
    assert server.served["big"] == len(files["big"])


def test_connections_are_kept_for_many_small_files(ran: Ran) -> None:
    files = {f"f{number:03}": noise(200, number) for number in range(300)}
    with FilesServer(files) as server:
        ran.fetch(listing(files), Plain(server.url))
    ran.check(files)
    assert len({seen.client for seen in server.seen}) <= LIMITS.connections


@pytest.mark.parametrize(
    "broken",
    [status(500), status(503), status(408), status(425), cut_after(100_000), cut_after(0), lambda exchange: exchange.drop() or True],
    ids=["500", "503", "408", "425", "cut", "cut at once", "reset"],
)
def test_passing_failure_is_asked_again(ran: Ran, broken: Behaviour) -> None:
    files = {MODEL: FILES[MODEL]}
    with FilesServer(files, script=[broken, broken]) as server:
        ran.fetch(listing(files), Plain(server.url))
    ran.check(files)
    assert len(server.seen) == 3
    assert ran.log.count("asking again") == 2


def test_broken_body_goes_on_from_the_byte_reached(ran: Ran) -> None:
    files = {MODEL: FILES[MODEL]}
    with FilesServer(files, script=[cut_after(1_000_000), cut_after(1_000_000)]) as server:
        ran.fetch(listing(files), Plain(server.url))
    ran.check(files)
    assert [seen.headers["Range"].split("-")[0] for seen in server.seen] == ["bytes=0", "bytes=1000000", "bytes=2000000"]
    assert server.served[MODEL] == len(FILES[MODEL])


def test_progress_makes_attempts_count_anew(ran: Ran) -> None:
    files = {MODEL: FILES[MODEL]}
    with FilesServer(files, rule=cut_after(200_000)) as server:
        ran.fetch(listing(files), Plain(server.url))
    ran.check(files)
    assert len(server.seen) == 15


def test_server_that_keeps_failing_ends_as_unavailable(ran: Ran) -> None:
    with FilesServer(FILES, rule=status(500)) as server, pytest.raises(SourceUnavailable) as raised:
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
    assert raised.value.code == "source_unavailable"
    assert MODEL in raised.value.what
    assert "500" in raised.value.what
    assert len(server.seen) == LIMITS.attempts


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(ran: Ran, form: str) -> None:
    files = {MODEL: FILES[MODEL]}
    after = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    times: list[float] = []

    def busy(exchange: Exchange) -> bool:
        times.append(time.monotonic())
        if len(times) == 1:
            exchange.reply(429, b"slow down", {"Retry-After": after})
            return True
        return False

    with FilesServer(files, rule=busy) as server:
        ran.fetch(listing(files), Plain(server.url))
    ran.check(files)
    assert 0.9 <= times[1] - times[0] < 10


@pytest.mark.parametrize("code", [401, 403, 404, 410, 451])
def test_refusal_is_final_and_in_the_words_of_the_source(ran: Ran, code: int) -> None:
    said = PermissionMissing("gated", "the model is gated", "accept its licence")
    with FilesServer(FILES, rule=status(code, b"<Error/>")) as server, pytest.raises(PermissionMissing) as raised:
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url, refusals={code: said}))
    assert raised.value is said
    assert len(server.seen) == 1


@pytest.mark.parametrize(("code", "kind"), [(401, PermissionMissing), (403, PermissionMissing), (404, ModelNotFound), (400, ModelNotFound)])
def test_refusal_without_words_of_the_source(ran: Ran, code: int, kind: type[Exception]) -> None:
    with FilesServer(FILES, rule=status(code)) as server, pytest.raises(kind) as raised:
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
    assert not isinstance(raised.value, SourceUnavailable)
    assert str(code) in str(raised.value)
    assert MODEL in str(raised.value)
    assert len(server.seen) == 1


@pytest.mark.parametrize("rule", [no_ranges, chunked], ids=["length", "chunks"])
def test_server_without_ranges(ran: Ran, rule: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MIN_PART_BYTES", 1 << 20)
    with FilesServer(FILES, rule=rule) as server:
        ran.fetch(listing(FILES), Plain(server.url))
    ran.check(FILES)
    assert all(progress.done_bytes <= progress.total_bytes for progress in ran.progress)
    assert ran.progress[-1].done_bytes == ran.progress[-1].total_bytes


def test_server_without_ranges_that_breaks_off(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MIN_PART_BYTES", 1 << 20)
    cuts = [0]

    def breaking(exchange: Exchange) -> bool:
        assert exchange.content is not None
        exchange.head(200, len(exchange.content))
        cuts[0] += 1
        exchange.send(0, min(cuts[0] * 900_000, len(exchange.content)))
        if cuts[0] * 900_000 < len(exchange.content):
            exchange.drop()
        return True

    files = {MODEL: FILES[MODEL]}
    with FilesServer(files, rule=breaking) as server:
        ran.fetch(listing(files), Plain(server.url), replace(LIMITS, connections=1))
    ran.check(files)
    assert "fetched anew" not in ran.log


def test_stalled_body_is_asked_anew(ran: Ran) -> None:
    files = {MODEL: FILES[MODEL]}
    began = time.monotonic()
    with FilesServer(files, script=[stall_after(500_000)]) as server:
        ran.fetch(listing(files), Plain(server.url), replace(LIMITS, stall_s=0.5))
    ran.check(files)
    assert "no byte from" in ran.log
    assert server.served[MODEL] == len(FILES[MODEL])
    assert time.monotonic() - began < 10


def test_answer_that_never_comes_ends_as_unavailable(ran: Ran) -> None:
    def silent(exchange: Exchange) -> bool:
        exchange.hang()
        return True

    with FilesServer(FILES, rule=silent) as server, pytest.raises(SourceUnavailable, match="no byte from"):
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url), replace(LIMITS, stall_s=0.2))


def test_trickle_counts_as_a_stall(ran: Ran) -> None:
    files = {MODEL: FILES[MODEL]}

    def trickle(exchange: Exchange) -> bool:
        begin, end = exchange.asked or (0, 0)
        exchange.head(206, end - begin, {"Content-Range": f"bytes {begin}-{end - 1}/{len(FILES[MODEL])}"})
        try:
            while not exchange.owner.closing.wait(0.05):
                exchange.send(begin, begin + 1)
                begin += 1
        except OSError:
            exchange.close_connection = True
        return True

    with FilesServer(files, script=[trickle]) as server:
        ran.fetch(listing(files), Plain(server.url), replace(LIMITS, stall_s=0.5))
    ran.check(files)
    assert "bytes in" in ran.log


def test_one_file_that_fails_ends_all_at_once(ran: Ran) -> None:
    def rule(exchange: Exchange) -> bool:
        if exchange.name == "bad":
            time.sleep(0.2)
            exchange.reply(404)
        else:
            stall_after(1000)(exchange)
        return True

    files = {"bad": b"x" * 10, **{f"good{number}": noise(100_000, number) for number in range(3)}}
    began = time.monotonic()
    with FilesServer(files, rule=rule) as server, pytest.raises(ModelNotFound, match="bad"):
        ran.fetch(listing(files), Plain(server.url))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupt_leaves_no_thread_and_what_came(ran: Ran, error: type[BaseException]) -> None:
    files = {MODEL: FILES[MODEL]}

    def report(progress: object) -> None:
        raise error

    with FilesServer(files, script=[stall_after(1_000_000)]) as server:
        listed = listing(files)
        with pytest.raises(error):
            download(listed, Plain(server.url), Stage.open(ran.store, "tiny", listed), LIMITS, {}, report, ran.lines.append)
        assert threading.active_count() < 10


def test_log_says_no_query_and_no_header(ran: Ran) -> None:
    files = {MODEL: FILES[MODEL]}

    class Signed(Plain):
        def request(self, file: RemoteFile, begin: int, end: int) -> Request:
            made = Plain.request(self, file, begin, end)
            return replace(made, url=f"{made.url}?X-Amz-Signature=topsecret")

    with FilesServer(files, script=[status(500), cut_after(10), status(429)]) as server:
        ran.fetch(listing(files), Signed(server.url, {"Authorization": "topsecret"}))
    ran.check(files)
    assert "500" in ran.log
    assert "topsecret" not in ran.log


def test_ten_thousand_small_files(ran: Ran) -> None:
    files = {f"d{number // 100}/f{number}": b"%d" % number for number in range(10_000)}
    began = time.monotonic()
    with FilesServer(files) as server:
        ran.fetch(listing(files), Plain(server.url))
    assert len(ran.digests) == len(files)
    assert (ran.files / "d99/f9999").read_bytes() == b"9999"
    assert time.monotonic() - began < 60


def test_hashing_can_be_left_out_for_measuring(ran: Ran) -> None:
    with FilesServer(FILES) as server:
        ran.fetch(listing(FILES), Plain(server.url), replace(LIMITS, hashes=False))
    assert (ran.files / MODEL).read_bytes() == FILES[MODEL]
    assert ran.digests[MODEL].sha256 == ""


def test_progress_comes_twice_a_second_with_rate_and_eta(ran: Ran) -> None:
    def slow(exchange: Exchange) -> bool:
        begin, end = exchange.asked or (0, 0)
        exchange.head(206, end - begin, {"Content-Range": f"bytes {begin}-{end - 1}/{len(FILES[MODEL])}"})
        for at in range(begin, end, 250_000):
            exchange.send(at, min(at + 250_000, end))
            time.sleep(0.15)
        return True

    with FilesServer({MODEL: FILES[MODEL]}, rule=slow) as server:
        ran.fetch(listing({MODEL: FILES[MODEL]}), Plain(server.url))
    middle = [progress for progress in ran.progress if 0 < progress.done_bytes < progress.total_bytes]
    assert 2 <= len(middle) <= 8
    assert 500_000 < middle[-1].bytes_per_s < 5_000_000
    assert 0 <= middle[-1].eta_s <= 10


def test_files_have_the_owner_of_the_store(ran: Ran) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a store to another user")
    os.chown(ran.store, 4321, 4321)
    with FilesServer(FILES) as server:
        ran.fetch(listing(FILES), Plain(server.url))
    assert {path.stat().st_uid for path in ran.files.rglob("*")} == {4321}
