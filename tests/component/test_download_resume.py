"""An interrupted download goes on where it was: killed, cut from power, or with a stage that somebody damaged."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests import procs
from tests.component.downloads import LIMITS, Plain, Ran, listing, noise
from tests.fakes.files_server import Content, Exchange, FilesServer, Zeros, status
from vllmd.errors import ModelNotFound
from vllmd.models.remote import Listing
from vllmd.models.stage import Stage
from vllmd.models.transfer import hashers, journal, worker

pytestmark = pytest.mark.component

FILES = {"config.json": b"{}", "a.safetensors": noise(24_000_000, 1), "b.safetensors": noise(16_000_000, 2), "empty": b""}
ROOT = Path(__file__).parents[2]


def child(store: Path, url: str, listed: Listing, connections: int = 4) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.component.download_child", str(store), url, str(connections)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert started.stdin
    started.stdin.write(json.dumps([[file.name, file.size, dict(file.sums)] for file in listed.files]).encode())
    started.stdin.close()
    return started


def kept(store: Path) -> dict[str, list[tuple[int, int]]]:
    return {name: list(what.ranges) for name, what in journal.Journal(store / ".staging/tiny/journal").read().items()}


def overlap(asked: str, ranges: list[tuple[int, int]]) -> int:
    begin, end = (int(edge) for edge in asked.removeprefix("bytes=").split("-"))
    return sum(max(0, min(end + 1, high) - max(begin, low)) for low, high in ranges)


def kill_at_random(store: Path, server: FilesServer, listed: Listing, kills: int, seed: int) -> int:
    """How many bytes all the killed runs left."""
    choice = random.Random(seed)
    for _ in range(kills):
        before, asked = kept(store), len(server.seen)
        until = sum(server.served.values()) + choice.randrange(1, 6_000_000)
        running = child(store, server.url, listed)
        with running:
            deadline = time.monotonic() + 30
            while sum(server.served.values()) < until and running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            running.kill()
        for seen in server.seen[asked:]:
            assert overlap(seen.headers["Range"], before.get(seen.path.lstrip("/"), [])) == 0, "what was there is fetched again"
    return sum(high - low for ranges in kept(store).values() for low, high in ranges)


def settled(server: FilesServer) -> int:
    """Bytes served, when the threads that served a killed client have noticed."""
    counts = [-1]

    def is_still() -> bool:
        counts.append(sum(server.served.values()))
        return counts[-1] == counts[-2]

    procs.wait_until("nobody is served any more", is_still, 10, every_s=0.3)
    return counts[-1]


def test_killed_at_random_moments_it_fetches_no_byte_twice_that_it_noted(ran: Ran) -> None:
    listed = listing(FILES)
    with FilesServer(FILES) as server:
        there = kill_at_random(ran.store, server, listed, 10, seed=os.getpid())
        assert there > 1_000_000
        before, served = kept(ran.store), settled(server)
        remaining = Stage.open(ran.store, "tiny", listed).remaining_bytes(listed)
        assert remaining == listed.bytes - sum(high - low for ranges in before.values() for low, high in ranges)
        ran.fetch(listed, Plain(server.url))
        assert sum(server.served.values()) - served == remaining
    ran.check(FILES)


@pytest.mark.soak
def test_killed_two_hundred_times(ran: Ran) -> None:
    files = {**FILES, "c.safetensors": noise(300_000_000, 3)}
    with FilesServer(files) as server:
        kill_at_random(ran.store, server, listing(files), 200, seed=os.getpid())
        ran.fetch(listing(files), Plain(server.url))
    ran.check(files)


def interrupted(ran: Ran, files: Mapping[str, Content], monkeypatch: pytest.MonkeyPatch, *, sums: bool = True) -> Listing:
    """A download of which the last file failed and the first is half there."""
    monkeypatch.setattr(worker, "NOTE_BYTES", 1 << 20)
    monkeypatch.setattr(hashers, "NOTE_BYTES", 1 << 20)
    monkeypatch.setattr(hashers, "BEHIND_BYTES", 1 << 18)
    listed = listing(files, sums=sums)

    def half(exchange: Exchange) -> bool:
        begin, end = exchange.asked or (0, 0)
        if exchange.name != "a.safetensors":
            return False
        if begin >= 12_000_000:
            time.sleep(0.5)
            exchange.reply(404)
            return True
        exchange.head(206, end - begin, {"Content-Range": f"bytes {begin}-{end - 1}/24000000"})
        exchange.send(begin, 12_000_000)
        exchange.drop()
        return True

    with FilesServer(files, rule=half) as server, pytest.raises(ModelNotFound):
        ran.fetch(listed, Plain(server.url), replace(LIMITS, connections=1))
    assert kept(ran.store)["a.safetensors"] == [(0, 12_000_000)]
    return listed


def test_what_is_complete_is_not_asked_again(ran: Ran) -> None:
    files = {"a": noise(100_000), "b": noise(100_000, 2)}
    listed = listing(files)
    with FilesServer(files, rule=lambda exchange: exchange.name == "b" and status(404)(exchange)) as server, pytest.raises(ModelNotFound):
        ran.fetch(listed, Plain(server.url), replace(LIMITS, connections=1))
    assert set(Stage.open(ran.store, "tiny", listed).have()) == {"a"}
    with FilesServer(files) as server:
        ran.fetch(listed, Plain(server.url))
        assert server.served == {"b": 100_000}
    ran.check(files)


def test_second_download_of_the_same_asks_nothing(ran: Ran) -> None:
    with FilesServer(FILES) as server:
        ran.fetch(listing(FILES), Plain(server.url))
        asked = len(server.seen)
        ran.fetch(listing(FILES), Plain(server.url))
        assert len(server.seen) == asked
    ran.check(FILES)
    assert ran.progress[-1].done_bytes == ran.progress[-1].total_bytes


def test_resumed_bytes_count_as_done_from_the_start(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = interrupted(ran, FILES, monkeypatch)
    ran.progress.clear()
    with FilesServer(FILES) as server:
        ran.fetch(listed, Plain(server.url))
    assert ran.progress[0].done_bytes >= 12_000_000
    ran.check(FILES)


@pytest.mark.parametrize("sums", [True, False], ids=["listed sums", "pins only"])
def test_bytes_that_a_power_cut_took_are_noticed(ran: Ran, monkeypatch: pytest.MonkeyPatch, sums: bool) -> None:
    """The journal and the length of the file survived, and some of its blocks did not; only our own sums can tell."""
    listed = interrupted(ran, FILES, monkeypatch, sums=sums)
    part = Stage.open(ran.store, "tiny", listed).part_path("a.safetensors")
    with part.open("r+b") as file:
        file.seek(5_000_000)
        file.write(bytes(3_000_000))
    monkeypatch.setattr(journal, "boot_id", lambda: "another boot")
    with FilesServer(FILES) as server:
        ran.fetch(listed, Plain(server.url))
    ran.check(FILES)
    assert "not what an earlier attempt wrote" in ran.log
    assert server.served["a.safetensors"] <= 24_000_000 - (4 << 20)  # what stands before the hole is kept
    assert ran.progress[-1].done_bytes == ran.progress[-1].total_bytes


def test_after_a_power_cut_only_what_has_a_sum_is_believed(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = interrupted(ran, FILES, monkeypatch, sums=False)
    monkeypatch.setattr(journal, "boot_id", lambda: "another boot")
    with FilesServer(FILES) as server:
        ran.fetch(listed, Plain(server.url))
    ran.check(FILES)
    assert server.served["a.safetensors"] == 24_000_000 - 11 * (1 << 20)


def test_complete_file_that_a_power_cut_damaged_is_fetched_again(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": noise(3_000_000), "b": noise(100_000, 2)}
    with FilesServer(files) as server:
        ran.fetch(listing(files, sums=False), Plain(server.url))
        path = ran.files / "a"
        times = path.stat()
        with path.open("r+b") as file:
            file.write(bytes(100_000))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        monkeypatch.setattr(journal, "boot_id", lambda: "another boot")
        server.served.clear()
        ran.fetch(listing(files, sums=False), Plain(server.url))
        assert server.served == {"a": 3_000_000}
    ran.check(files)


def test_complete_files_are_hashed_and_not_fetched_after_a_reboot(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    with FilesServer(FILES) as server:
        ran.fetch(listing(FILES), Plain(server.url))
        monkeypatch.setattr(journal, "boot_id", lambda: "another boot")
        server.served.clear()
        assert Stage.open(ran.store, "tiny", listing(FILES)).have() == {}
        ran.fetch(listing(FILES), Plain(server.url))
        assert server.served == {}
    ran.check(FILES)


def test_many_complete_files_after_a_reboot_need_few_descriptors(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"f{number}": b"%d" % number for number in range(600)}
    with FilesServer(files) as server:
        ran.fetch(listing(files), Plain(server.url))
        monkeypatch.setattr(journal, "boot_id", lambda: "another boot")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        try:
            ran.fetch(listing(files), Plain(server.url))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    ran.check(files)


def test_other_versions_bytes_are_not_gone_on_with(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(ran, FILES, monkeypatch)
    changed = {**FILES, "a.safetensors": noise(24_000_000, 9)}
    with FilesServer(changed) as server:
        ran.fetch(listing(changed), Plain(server.url))
        assert server.served["a.safetensors"] == 24_000_000
    ran.check(changed)


@pytest.mark.parametrize("damage", ["cut", "zeros", "noise", "gone", "link"])
def test_damaged_journal_costs_bytes_and_nothing_else(ran: Ran, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    listed = interrupted(ran, FILES, monkeypatch)
    path = ran.store / ".staging/tiny/journal"
    data = path.read_bytes()
    path.unlink()
    match damage:
        case "cut":
            path.write_bytes(data.rstrip(b"\0")[:-70])
        case "zeros":
            path.write_bytes(bytes(len(data)))
        case "noise":
            path.write_bytes(noise(100_000))
        case "link":
            path.symlink_to("/etc/passwd")
    with FilesServer(FILES) as server:
        ran.fetch(listed, Plain(server.url))
    ran.check(FILES)


def test_memory_stays_small_whatever_the_size(tmp_path: Path) -> None:
    files: dict[str, Content] = {"big": Zeros(600_000_000)}
    with FilesServer(files) as server, child(tmp_path, server.url, listing(files), 16) as running:
        assert running.stdout
        peak_kib = int(running.stdout.read())
    assert running.returncode == 0
    assert peak_kib < 100 << 10
