"""The collectors by themselves: real processes, a /proc with files that hang, a py-spy that misbehaves, and which incidents stay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import procs
from tests.needs import need
from vllmd.instance import badcache, causes, evidence_host, incident_store
from vllmd.instance.evidence_processes import LISTED, Processes
from vllmd.instance.evidence_sheet import Sheet, gathered
from vllmd.instance.evidence_stacks import find_py_spy, python_stacks
from vllmd.instance.incident_store import Part

pytestmark = [pytest.mark.component, pytest.mark.timeout(60)]


def collected(work: object, limit: int = 1 << 20, seconds: float = 5.0) -> Sheet:
    return asyncio.run(gathered(Sheet("x.txt", limit), seconds, work))  # type: ignore[arg-type]


# --- sheets


def test_a_sheet_takes_what_fits_and_says_that_it_was_cut() -> None:
    sheet = Sheet("x", 10)
    assert sheet.add("12345")
    assert not sheet.add("67890AB")
    assert sheet.text == "1234567890"
    assert "cut at 10 bytes" in sheet.note
    assert not sheet.add("more")


def test_a_character_that_is_cut_in_the_middle_is_left_out() -> None:
    sheet = Sheet("x", 4)
    sheet.add("aäää")
    assert sheet.text == "aä"


def test_what_was_there_before_the_deadline_is_kept_and_nothing_after_it() -> None:
    kept: list[Sheet] = []

    async def work(sheet: Sheet) -> None:
        kept.append(sheet)
        sheet.add("early\n")
        await asyncio.sleep(30)

    sheet = collected(work, seconds=0.1)
    assert sheet.text == "early\n"
    assert "not finished within 0.1 s" in sheet.note
    kept[0].add("late")
    assert "late" not in sheet.text


def test_a_collector_that_raises_leaves_a_note() -> None:
    async def work(sheet: Sheet) -> None:
        raise OSError(5, "Input/output error")

    assert "Input/output error" in collected(work).note


def test_control_characters_do_not_reach_a_file() -> None:
    sheet = Sheet("x", 100)
    sheet.add("a\x1b[2Jb\nc\0d")
    assert sheet.text == "a [2Jb\nc d"


# --- processes


def test_a_process_of_ours_is_shown_with_its_threads_and_what_they_wait_for() -> None:
    pid = os.getpid()
    processes = Processes([pid, 2**22 + 1])
    table, waits = collected(processes.table).text, collected(processes.waits).text
    assert f"{pid:>8}" in table
    assert "gone" in table
    assert f"=== {pid} " in waits
    assert "State:" in waits
    assert f"thread {pid}" in waits


@contextlib.contextmanager
def fake_proc(root: Path, pids: range, hangs: int) -> Iterator[Path]:
    """A /proc in which the stat of one process never answers: a fifo without a writer."""
    for pid in pids:
        task = root / str(pid) / "task" / str(pid)
        task.mkdir(parents=True)
        stat = f"{pid} (na (me) {pid}) S 1 1 1 0 0 0 0 0 0 0 100 50 0 0 20 0 3 0 77 0 {pid} 0 0"
        for folder in (root / str(pid), task):
            (folder / "stat").write_text(stat)
        (task / "wchan").write_text("do_wait")
    (root / str(hangs) / "stat").unlink()
    os.mkfifo(root / str(hangs) / "stat")
    yield root
    while any(thread.name == "vllmd-blocking" for thread in threading.enumerate()):  # whoever hangs is let go
        with contextlib.suppress(OSError):
            os.close(os.open(root / str(hangs) / "stat", os.O_WRONLY | os.O_NONBLOCK))
        time.sleep(0.01)


def test_one_process_whose_files_hang_costs_its_own_lines_only(tmp_path: Path) -> None:
    with fake_proc(tmp_path, range(100, 130), 107) as proc:
        processes = Processes(range(100, 130), proc)
        began = time.monotonic()
        table = collected(processes.table, seconds=0.7)
        waits = collected(processes.waits, seconds=0.7)
        assert time.monotonic() - began < 5
    assert "not finished within" in table.note
    assert all(f"{pid:>8}" in table.text for pid in range(100, 130) if pid != 107)
    assert all(f"=== {pid} na (me) {pid}" in waits.text for pid in range(100, 130) if pid != 107)
    assert "waits in do_wait" in waits.text


def test_the_largest_processes_are_listed_when_there_are_too_many(tmp_path: Path) -> None:
    with fake_proc(tmp_path, range(100, 100 + 2 * LISTED), 100) as proc:
        processes = Processes(range(101, 100 + 2 * LISTED), proc)
        collected(processes.table)
        waits = collected(processes.waits)
    assert f"=== {99 + 2 * LISTED} " in waits.text, "memory grows with the pid here"
    assert "=== 101 " not in waits.text
    assert f"the {LISTED} largest of {2 * LISTED - 1}" in waits.note


# --- py-spy


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_py_spy_is_found_beside_the_engine_before_the_path(tmp_path: Path) -> None:
    assert find_py_spy(str(tmp_path / "vllm"), {"PATH": "/nothing"}) == ""
    beside = script(tmp_path / "py-spy", "true")
    assert find_py_spy(str(tmp_path / "vllm"), {"PATH": "/nothing"}) == beside
    assert find_py_spy("/nothing/vllm", {"PATH": str(tmp_path)}) == beside


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('echo "Thread of $4"; echo "$*"', "Thread of 11\ndump --nonblocking --pid 11"),
        ("echo Permission denied >&2; exit 1", "Permission denied"),
        ("echo begun; sleep 60", "begun\n(py-spy did not end in time)"),
        ("yes x | head -c 50000000", "x\nx\n" * 1000),
    ],
    ids=["works", "refused", "hangs", "floods"],
)
def test_whatever_py_spy_does_is_bounded_and_kept(tmp_path: Path, text: str, expected: str) -> None:
    program = script(tmp_path / "py-spy", text)

    async def work(sheet: Sheet) -> None:
        await python_stacks(sheet, program, [11, 12])

    began = time.monotonic()
    sheet = collected(work, limit=128 << 10)
    assert time.monotonic() - began < 4.5
    assert expected in sheet.text
    assert len(sheet.text) <= 128 << 10


def test_py_spys_that_hang_are_ended_at_the_deadline(tmp_path: Path) -> None:
    program = script(tmp_path / "py-spy", "exec sleep 60")

    async def work(sheet: Sheet) -> None:
        await python_stacks(sheet, program, list(range(11, 27)))

    began = time.monotonic()
    sheet = collected(work, seconds=1.0)
    assert time.monotonic() - began < 2
    assert "not finished" in sheet.note
    # no process is left: the fixture looks


def test_the_real_py_spy_shows_the_functions_of_a_process() -> None:
    program = shutil.which("py-spy") or ""
    if not program:
        pytest.skip("py-spy is not on PATH")
    with subprocess.Popen([sys.executable, "-c", "def stuck():\n import time\n print('up', flush=True)\n time.sleep(60)\nstuck()"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()

        async def work(sheet: Sheet) -> None:
            await python_stacks(sheet, program, [child.pid])

        text = collected(work).text
        child.kill()
    assert "stuck" in text


# --- the host


def test_the_hosts_pressure_and_memory_are_shown_without_a_cgroup() -> None:
    async def work(sheet: Sheet) -> None:
        await evidence_host.accounts(sheet, "")

    assert "MemAvailable" in collected(work).text
    assert evidence_host.oom_kills("") is None


def test_kills_of_a_cgroup_are_its_own_count(tmp_path: Path) -> None:
    group = tmp_path / "unit/engine-1"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 3\noom_group_kill 1\n")
    (group / "memory.peak").write_text(f"{23 << 30}\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.peak").write_text(f"{24 << 30}\n")
    (group.parent / "memory.max").write_text(f"{24 << 30}\n")
    assert evidence_host.oom_kills(str(group)) == 3
    assert evidence_host.memory_text(str(group)) == "it used at most 24.00 GiB of its 24.00 GiB (MemoryMax=)"


def test_kernel_lines_come_within_their_deadline_or_say_that_they_are_not_readable() -> None:
    began = time.monotonic()
    sheet = collected(evidence_host.kernel_lines)
    assert time.monotonic() - began < 4
    assert bool(sheet.text) is not bool(sheet.note)
    assert len(sheet.text.splitlines()) <= evidence_host.KERNEL_LINES


# --- the store


def incident(folder: Path, number: int, fingerprint: str, keep: int) -> str:
    ident = f"20260101T00{number // 60:02}{number % 60:02}.000Z-{number:06x}"
    incident_store.write(folder, ident, [Part("cause.txt", b"x")], {"fingerprint": fingerprint}, keep=keep)
    return ident


def test_the_newest_are_kept_and_the_first_of_each_series_that_reaches_into_them(tmp_path: Path) -> None:
    folder = tmp_path / "incidents"
    made = [incident(folder, number, mark, keep=3) for number, mark in enumerate("AAAAAB")]
    assert incident_store.names(folder) == [made[0], *made[-3:]], "the series of A reaches into the newest"
    made += [incident(folder, 6 + number, mark, keep=3) for number, mark in enumerate("BBBBBBB")]
    assert incident_store.names(folder) == [made[5], *made[-3:]]
    for number in range(20, 60):
        made.append(incident(folder, number, f"other-{number}", keep=3))
    assert incident_store.names(folder) == made[-3:]


def test_a_clock_that_went_back_costs_no_new_incident(tmp_path: Path) -> None:
    """Ordered by name, what came after it was the oldest, and went first."""
    folder = tmp_path / "incidents"
    for number in range(10):
        incident_store.write(folder, f"20990101T00000{number}.999Z-00000{number}", [], {"fingerprint": f"f{number}"}, keep=10)
    made = []
    for mark in "ab":
        made.append(incident_store.new_id(folder))
        incident_store.write(folder, made[-1], [], {"fingerprint": mark}, keep=10)
    assert made == sorted(made)
    assert incident_store.names(folder)[-2:] == made
    assert made[0].startswith("20990101T000010.000Z-")
    for last in ("99991231T235959.999Z-000000", "99999999T999999.999Z-000000"):  # nothing comes after these
        (folder / last).mkdir()
        assert incident_store.NAME.fullmatch(incident_store.new_id(folder))


def test_incidents_without_a_fingerprint_are_no_series(tmp_path: Path) -> None:
    folder = tmp_path / "incidents"
    made = [incident(folder, number, "", keep=2) for number in range(6)]
    assert incident_store.names(folder) == made[-2:]


def test_files_of_others_hide_no_incident(tmp_path: Path) -> None:
    """The first thousand entries were looked at, whatever they were."""
    folder = tmp_path / "incidents"
    folder.mkdir()
    for number in range(incident_store.SEEN + 200):
        (folder / f"junk-{number}").touch()
    made = [incident(folder, number, f"f{number}", keep=2) for number in range(20)]
    assert incident_store.names(folder) == made[-2:]
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert incident_store.listed(descriptor) == made[-2:]
    finally:
        os.close(descriptor)


def test_what_a_killed_supervisor_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "incidents"
    (folder / ".new-20260101T000000.000Z-00000a").mkdir(parents=True)
    (folder / "README of a person").touch()
    made = incident(folder, 1, "A", keep=2)
    assert sorted(path.name for path in folder.iterdir()) == [made, "README of a person"]


def test_a_disk_with_little_room_keeps_the_summary_and_the_small_parts(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "vllmd-test", str(folder)], check=False, capture_output=True)
    need(done.returncode == 0, "may mount a tmpfs")
    try:
        parts = [Part("cause.txt", b"c" * 100), Part("metrics.txt", b"m" * 1_000_000), Part("engine.log", b"e" * 2000), Part("fill.txt", b"f" * 45_000)]
        complaint = incident_store.write(folder, "20260101T000000.000Z-00000a", parts, {"code": "x", "why": "y" * 9000}, keep=2)
        made = folder / "20260101T000000.000Z-00000a"
        summary = json.loads((made / "summary.json").read_text())
        assert "metrics.txt: No space left on device" in complaint
        assert summary["lost"].keys() >= {"metrics.txt"}
        assert (made / "cause.txt").read_bytes() == b"c" * 100
        assert {part["name"] for part in summary["parts"]} == {path.name for path in made.iterdir()} - {"summary.json"}
        for path in made.iterdir():
            assert path.stat().st_size > 0
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_causes_are_counted_over_lives_and_survive_a_broken_file(tmp_path: Path) -> None:
    for number in range(30):
        coming = causes.read(tmp_path).next(f"t{number}", "engine_bug", "KeyError:1", f"i{number}")
        assert causes.note(tmp_path, coming) == ""
    known = causes.read(tmp_path)
    assert known.restarts == {"engine_bug": 30}
    assert len(known.last) == causes.LAST
    assert (known.last[-1].count, known.last[-1].since, known.last[-1].first) == (30, "t0", "i0"), "beyond what is listed"
    assert known.next("t", "engine_bug", "other", "i").count == 1
    for broken in (b"", b"[]", b"{" * 9999, b'{"schema": 1, "restarts": 7, "last": {"a": 1}}', b'{"schema": 1, "last": [7, {"at": 1}]}', b"\xff\xfe", b"x" * 100_000):
        (tmp_path / causes.NAME).write_bytes(broken)
        assert causes.read(tmp_path) == causes.Causes()
        assert causes.note(tmp_path, coming) == ""


def test_a_cache_is_moved_only_from_below_our_own_and_never_through_a_link(tmp_path: Path) -> None:
    state, root, outside = tmp_path / "state", tmp_path / "cache", tmp_path / "outside"
    for path in (state, root, outside):
        path.mkdir()
    (root / "link").symlink_to(outside)
    for caches in ((outside,), (root / "link",), (root / "missing",)):
        assert asyncio.run(badcache.move_aside(state, root, caches, "", "id")) is None
    (root / "inductor").mkdir()
    (root / "triton").mkdir()
    (root / "triton.bad-old").mkdir()
    moved = asyncio.run(badcache.move_aside(state, root, (root / "inductor", root / "triton"), "error in /x/triton/y.json", "id"))
    assert moved == (root / "triton", root / "triton.bad-id")
    procs.wait_until("the older one to go", lambda: sorted(path.name for path in root.iterdir()) == ["inductor", "link", "triton.bad-id"])
    assert asyncio.run(badcache.move_aside(state, root, (root / "inductor",), "", "id")) is None, "once"


def cache(tmp_path: Path) -> tuple[Path, Path]:
    """(state, root) with a cache and one that was moved aside before."""
    state, root = tmp_path / "state", tmp_path / "cache"
    (root / "triton").mkdir(parents=True)
    (root / "triton.bad-old").mkdir()
    state.mkdir()
    return state, root


def test_removing_an_older_cache_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold gigabytes: it took longer than the step may, and was told as a cache that could not be moved."""
    state, root = cache(tmp_path)
    gate, real = threading.Event(), shutil.rmtree

    def slow(path: Path, ignore_errors: bool) -> None:
        gate.wait(20)
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(badcache.shutil, "rmtree", slow)  # type: ignore[attr-defined]
    try:
        moved = asyncio.run(asyncio.wait_for(badcache.move_aside(state, root, (root / "triton",), "", "id"), 5))
        assert moved == (root / "triton", root / "triton.bad-id")
        assert (root / "triton.bad-old").exists()
    finally:
        gate.set()
    procs.wait_until("the older one to go", lambda: [path.name for path in root.iterdir()] == ["triton.bad-id"])


def test_a_cache_that_cannot_be_moved_has_its_chance_again(tmp_path: Path) -> None:
    """The mark says that it was tried, and was made before."""
    state, root = cache(tmp_path)
    (root / "triton.bad-id/full").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        asyncio.run(badcache.move_aside(state, root, (root / "triton",), "", "id"))
    assert not badcache.is_marked(state)
    assert asyncio.run(badcache.move_aside(state, root, (root / "triton",), "", "other")) is not None
    assert badcache.is_marked(state)
    procs.wait_until("the older ones to go", lambda: [path.name for path in root.iterdir()] == ["triton.bad-other"])
