"""The quarantine's files: what a boot lifts, what a repetition makes of it, and what is hostile in a directory of the service's user."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vllmd.config.paths import Paths, root_paths
from vllmd.gpu import quarantine
from vllmd.gpu.quarantine import BOOTS, FORGET_S, Record
from vllmd.system.host import boot_id

pytestmark = pytest.mark.component

UUID = "GPU-b850f46d-d5ea-c752-ddf3-c07454c2d4ba"
RESET = Record(UUID, "reset", 48, "what", "hint", last_at=1000.0)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return root_paths(tmp_path)


def write(paths: Paths, content: bytes, name: str = f"{UUID}.json") -> None:
    quarantine.folder_of(paths).mkdir(parents=True, exist_ok=True)
    (quarantine.folder_of(paths) / name).write_bytes(content)


def test_what_is_added_is_read_until_it_is_cleared(paths: Paths) -> None:
    assert quarantine.read(paths) == {}
    kept = quarantine.add(paths, RESET)
    assert (kept.boot_id, kept.first_at, kept.count, kept.boots) == (boot_id(), 1000.0, 1, 1)
    assert quarantine.read(paths) == {UUID: kept}
    assert quarantine.clear(paths, UUID)
    assert quarantine.read(paths) == {}
    assert not quarantine.clear(paths, UUID)


def test_the_file_is_as_documented(paths: Paths) -> None:
    quarantine.add(paths, RESET)
    path = quarantine.folder_of(paths) / f"{UUID}.json"
    words = json.loads(path.read_text())
    assert words.items() >= {"schema": 1, "uuid": UUID, "boot_id": boot_id(), "class": "reset", "xid": 48, "count": 1, "what": "what", "hint": "hint", "first_at": 1000.0, "last_at": 1000.0}.items()
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("cls", "lifted"), [("reset", True), ("reboot", True), ("replace", False)])
def test_a_boot_lifts_reset_and_reboot(paths: Paths, cls: quarantine.Class, lifted: bool) -> None:
    quarantine.add(paths, replace(RESET, cls=cls), boot="b001")
    assert UUID in quarantine.read(paths, boot="b001")
    assert (UUID not in quarantine.read(paths, boot="b002")) == lifted
    assert UUID in quarantine.read_all(paths)


def test_in_one_boot_it_is_counted_and_the_graver_class_stays(paths: Paths) -> None:
    quarantine.add(paths, RESET, boot="b001")
    quarantine.add(paths, replace(RESET, cls="reboot", xid=79, what="off", last_at=1100.0), boot="b001")
    kept = quarantine.add(paths, replace(RESET, xid=95, last_at=1200.0), boot="b001")
    assert (kept.cls, kept.xid, kept.what, kept.count, kept.boots, kept.first_at, kept.last_at) == ("reboot", 79, "off", 3, 1, 1000.0, 1200.0)


def test_repeated_after_two_reboots_it_needs_a_person(paths: Paths) -> None:
    classes = [quarantine.add(paths, replace(RESET, last_at=1000.0 + number), boot=f"b{number}").cls for number in range(BOOTS)]
    assert classes == ["reset", "reset", "replace"]
    assert "2 reboots" in quarantine.read(paths, boot="bf")[UUID].what


def test_what_was_long_ago_is_forgotten(paths: Paths) -> None:
    for number in range(BOOTS):
        kept = quarantine.add(paths, replace(RESET, last_at=1000.0 + number * (FORGET_S + 1)), boot=f"b{number}")
    assert (kept.cls, kept.boots) == ("reset", 1)


def test_cleared_by_a_person_it_begins_anew(paths: Paths) -> None:
    for number in range(BOOTS):
        quarantine.add(paths, replace(RESET, last_at=1000.0 + number), boot=f"b{number}")
    quarantine.clear(paths, UUID)
    assert quarantine.add(paths, RESET, boot="be").cls == "reset"


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"schema": 1}', b'{"schema": 2, "uuid": "' + UUID.encode() + b'", "class": "reset"}',
    b'{"schema": 1, "uuid": "GPU-another", "class": "replace"}', b'{"schema": 1, "uuid": "' + UUID.encode() + b'", "class": "nice"}',
    b'{"schema": 1, "uuid": "' + UUID.encode() + b'", "class": ["replace"]}', b'{"schema": 1, "uuid": "' + UUID.encode() + b'", "class": "replace", "boot_id": "\\n"}',
    b'{"schema": 1, "uuid": "' + UUID.encode() + b'", "class": "replace"}' + b" " * 10_000, b"\xff\xfe" * 50,
])  # fmt: skip
def test_content_that_makes_no_sense_quarantines_nothing(paths: Paths, content: bytes) -> None:
    write(paths, content)
    assert quarantine.read(paths) == {}
    assert quarantine.add(paths, RESET).count == 1


def test_values_that_make_no_sense_become_harmless(paths: Paths) -> None:
    words = {"schema": 1, "uuid": UUID, "class": "replace", "what": "a\x1b[31m\nb" * 200, "hint": 7, "count": -5, "boots": True, "xid": 1e99, "first_at": "x", "last_at": float("inf")}
    write(paths, json.dumps(words).encode())
    record = quarantine.read(paths)[UUID]
    assert record.what.isprintable()
    assert len(record.what) <= 400
    assert (record.hint, record.count, record.boots, record.xid, record.first_at, record.last_at) == ("", 1, 1, 0, 0.0, 0.0)


def test_links_pipes_and_strange_names_are_passed_over(paths: Paths, tmp_path: Path) -> None:
    good = tmp_path / "elsewhere"
    good.write_text(json.dumps(replace(RESET, cls="replace").as_dict()))
    folder = quarantine.folder_of(paths)
    folder.mkdir(parents=True)
    (folder / f"{UUID}.json").symlink_to(good)
    os.mkfifo(folder / "GPU-pipe.json")
    (folder / "GPU-folder.json").mkdir()
    (folder / "..json").write_text("x")
    start = time.process_time()
    assert quarantine.read(paths) == {}
    assert time.process_time() - start < 1
    quarantine.add(paths, RESET)
    assert not (folder / f"{UUID}.json").is_symlink()
    assert "replace" in good.read_text(), "a link is replaced, never followed"


def test_a_folder_that_is_a_link_is_not_used(paths: Paths, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    paths.state.mkdir(parents=True)
    quarantine.folder_of(paths).symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        quarantine.add(paths, RESET)
    (target / f"{UUID}.json").write_text(json.dumps(replace(RESET, cls="replace").as_dict()))
    assert quarantine.read(paths) == {}
    assert not quarantine.clear(paths, UUID)


@pytest.mark.parametrize("uuid", ["", "GPU-", "../x", "GPU-../../etc/passwd", "GPU-a/b", "GPU-a\n", "MIG-1", "GPU-" + "a" * 200])
def test_only_a_uuid_names_a_file(paths: Paths, uuid: str) -> None:
    with pytest.raises(ValueError, match="no UUID"):
        quarantine.add(paths, replace(RESET, uuid=uuid))
    with pytest.raises(ValueError, match="no UUID"):
        quarantine.clear(paths, uuid)


def test_readers_never_see_half_a_record(paths: Paths) -> None:
    quarantine.add(paths, RESET)
    ended = threading.Event()
    seen: set[int] = set()

    def look() -> None:
        while not ended.is_set():
            seen.add(len(quarantine.read(paths)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for number in range(50):
            quarantine.add(paths, replace(RESET, last_at=1000.0 + number))
    finally:
        ended.set()
        thread.join()
    assert seen == {1}
    assert [path.name for path in quarantine.folder_of(paths).iterdir()] == [f"{UUID}.json"]
