"""The journal's native protocol against a datagram socket of the test's own: full, gone, back again; and the terminal."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import pty
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllmd.system.journal import Journal, open_journal
from vllmd.system.messages import message_id
from vllmd.system.outbox import Outbox
from vllmd.system.terminal import Stderr

pytestmark = pytest.mark.component


class Journald:
    """Receives as journald does: one datagram, or a memory file, per entry."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(str(path))

    def receive(self) -> dict[str, str]:
        data, control, _, _ = self.socket.recvmsg(1 << 20, 1024)
        for _, _, value in control:
            descriptor = array.array("i", value)[0]
            data = os.pread(descriptor, 1 << 24, 0)
            os.close(descriptor)
        return parse(data)

    def drain(self) -> list[dict[str, str]]:
        found = []
        while True:
            try:
                found.append(self.receive())
            except BlockingIOError:
                return found

    def close(self) -> None:
        self.socket.close()


def parse(data: bytes) -> dict[str, str]:
    fields = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, separator, value = line.partition(b"=")
        if not separator:
            size = struct.unpack("<Q", rest[:8])[0]
            value, rest = rest[8 : 8 + size], rest[9 + size :]
        fields[name.decode()] = value.decode()
        data = rest
    return fields


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journald(path: Path) -> Iterator[Journald]:
    journald = Journald(path)
    yield journald
    journald.close()


@pytest.fixture
def journal(path: Path, journald: Journald) -> Iterator[Journal]:
    journal = Journal({"instance": "qwen3"}, path=path, outbox=Outbox(limit_entries=1000))
    yield journal
    journal.close(0)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def test_an_event_carries_its_id_and_the_instance(journal: Journal, journald: Journald) -> None:
    journal.bind(launch="abc")
    journal.event("engine-ready", "ready after 31 s", priority=5, UNIT="x.service", empty="", none=None)
    assert journald.receive() == {
        "MESSAGE": "ready after 31 s",
        "PRIORITY": "5",
        "SYSLOG_IDENTIFIER": "vllmd",
        "VLLMD_INSTANCE": "qwen3",
        "VLLMD_LAUNCH": "abc",
        "MESSAGE_ID": message_id("engine-ready"),
        "VLLMD_EVENT": "engine-ready",
        "UNIT": "x.service",
    }


def test_several_lines_and_forged_fields_stay_one_value(journal: Journal, journald: Journald) -> None:
    journal.engine_line("first\nPRIORITY=0\nlast é \udc80", 3)
    entry = journald.receive()
    assert entry["MESSAGE"] == "first\nPRIORITY=0\nlast é ?"
    assert entry["PRIORITY"] == "3"


def test_an_entry_larger_than_a_datagram_goes_as_a_memory_file(journal: Journal, journald: Journald) -> None:
    text = "x" * 3_000_000
    journal.event("failed", text, priority=3)
    assert journald.receive()["MESSAGE"] == text


def test_events_below_the_level_are_not_sent(journal: Journal, journald: Journald) -> None:
    journal.event("", "detail", priority=7)
    assert journald.drain() == []


def test_a_journal_that_nobody_reads_never_blocks_and_loses_lines_before_events(journal: Journal, journald: Journald) -> None:
    async def scenario() -> list[dict[str, str]]:
        journal.attach(asyncio.get_running_loop())
        started = time.monotonic()
        for number in range(5000):
            journal.engine_line(f"line {number}")
            if number % 100 == 0:
                journal.event("", f"event {number}", priority=6)
        assert time.monotonic() - started < 2.0
        assert journal.waiting <= 1000
        entries: list[dict[str, str]] = []

        def all_flushed() -> bool:
            entries.extend(journald.drain())
            return journal.waiting == 0

        await until(all_flushed)
        return entries + journald.drain()

    entries = asyncio.run(scenario())
    messages = [entry["MESSAGE"] for entry in entries]
    assert [m for m in messages if m.startswith("event ")] == [f"event {n}" for n in range(0, 5000, 100)]
    assert messages[-2] == "line 4999" or messages[-1] == "line 4999", "the last words are the ones to keep"
    reports = [entry for entry in entries if entry.get("VLLMD_EVENT") == "lines-dropped"]
    lost = sum(int(entry["VLLMD_DROPPED_LINES"]) for entry in reports)
    assert lost > 0
    assert lost == 5000 - sum(m.startswith("line ") for m in messages) == journal.dropped


def test_an_idle_loop_waits_for_a_full_journal_without_spinning(journal: Journal, journald: Journald) -> None:
    async def scenario() -> float:
        journal.attach(asyncio.get_running_loop())
        while not journal.waiting:
            journal.engine_line("x")
        before = time.process_time()
        await asyncio.sleep(0.3)
        return time.process_time() - before

    assert asyncio.run(scenario()) < 0.1


def test_a_journal_that_comes_back_gets_what_waited(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllmd.system.sink.RETRY_S", 0.02)

    async def scenario() -> list[str]:
        journal = Journal({}, path=path).attach(asyncio.get_running_loop())
        journal.event("", "while away")
        journald = Journald(path)
        await until(lambda: journal.waiting == 0)
        first = [entry["MESSAGE"] for entry in journald.drain()]
        journald.close()
        path.unlink()
        journal.event("", "away again")
        journald = Journald(path)
        await until(lambda: journal.waiting == 0)
        second = [entry["MESSAGE"] for entry in journald.drain()]
        journal.close()
        journald.close()
        return first + second

    assert asyncio.run(scenario()) == ["while away", "away again"]


def test_close_sends_what_it_can_within_its_time(journal: Journal, journald: Journald) -> None:
    while not journal.waiting:
        journal.engine_line("x")
    started = time.monotonic()
    journal.close(0.1)
    assert 0.05 < time.monotonic() - started < 5.0


def test_the_reason_of_the_end_is_told_although_the_loop_is_gone(path: Path, journald: Journald) -> None:
    read, write = os.pipe()
    for sink in (Journal({}, path=path), Stderr({}, descriptor=write)):

        async def run(sink: Journal | Stderr = sink) -> None:
            sink.attach(asyncio.get_running_loop())

        asyncio.run(run())
        sink.close()
        sink.event("failed", "the reason", priority=3)
        sink.close()
    assert journald.receive()["MESSAGE"] == "the reason"
    assert os.read(read, 100) == b"ERROR  the reason\n"
    os.close(read)
    os.close(write)


def test_a_full_journal_after_the_loop_is_gone_raises_nothing(journal: Journal, journald: Journald) -> None:
    async def run() -> None:
        journal.attach(asyncio.get_running_loop())

    asyncio.run(run())
    while journal.waiting < 10:
        journal.event("", "x")


# --- which one, and the terminal


def test_systemd_gets_the_journal_and_a_person_gets_stderr(path: Path, journald: Journald) -> None:
    read, write = os.pipe()
    about = os.fstat(write)
    stream = f"{about.st_dev}:{about.st_ino}"
    main, terminal = pty.openpty()
    cases: list[tuple[dict[str, str], int, type]] = [
        ({"JOURNAL_STREAM": stream}, write, Journal),
        ({"JOURNAL_STREAM": "1:2", "INVOCATION_ID": "a"}, write, Stderr),
        ({"NOTIFY_SOCKET": "/run/systemd/notify"}, write, Journal),
        ({"NOTIFY_SOCKET": "/run/systemd/notify"}, terminal, Stderr),
        ({}, write, Stderr),
    ]
    try:
        for environ, descriptor, kind in cases:
            opened = open_journal(environ, {}, path=path, stderr_fd=descriptor)
            opened.close()
            assert type(opened) is kind, environ
        opened = open_journal({"JOURNAL_STREAM": stream}, {}, path=path.with_name("absent"), stderr_fd=write)
        opened.close()
        assert type(opened) is Stderr
    finally:
        for descriptor in (read, write, main, terminal):
            os.close(descriptor)


def test_stderr_is_logfmt_without_control_characters() -> None:
    read, write = os.pipe()
    stderr = Stderr({"instance": "x"}, descriptor=write)
    stderr.event("engine-ready", "ready", priority=5, after="31 s", phase="loading")
    stderr.engine_line("\x1b[31mred\x07 é")
    stderr.close()
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as reader:
        assert reader.read() == 'NOTICE ready after="31 s" phase=loading\nengine |  [31mred  é\n'


def test_a_terminal_gets_colours_and_a_pipe_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    main, terminal = pty.openpty()
    stderr = Stderr({}, descriptor=terminal)
    stderr.event("failed", "dead", priority=3)
    stderr.close()
    assert b"\x1b[1;31mERROR" in os.read(main, 1000)
    os.close(main)
    os.close(terminal)


def refuse_to_open_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does where the pipe is another user's: `docker run --user`, `su`."""
    real = os.open

    def refusing(path: str, *rest: int) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("stderr", ["pipe", "another user's pipe", "socket"])
def test_a_stopped_reader_of_stderr_never_blocks_us_and_loses_nothing_it_can_still_get(stderr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if stderr == "another user's pipe":
        refuse_to_open_again(monkeypatch)
    kind = stderr

    async def scenario() -> bytes:
        read, write = [end.detach() for end in socket.socketpair()] if kind == "socket" else os.pipe()
        stderr = Stderr({}, descriptor=write).attach(asyncio.get_running_loop())
        started = time.monotonic()
        for number in range(4000):
            stderr.engine_line(f"{number} " + "x" * 100)
        assert time.monotonic() - started < 2.0
        assert stderr.waiting > 0
        assert os.get_blocking(write), "the descriptor that we share with others keeps its mode"
        os.set_blocking(read, False)
        data = bytearray()

        def drained() -> bool:
            try:
                data.extend(os.read(read, 1 << 20))
            except BlockingIOError:
                return stderr.waiting == 0
            return False

        await until(drained)
        stderr.close()
        os.close(read)
        os.close(write)
        return bytes(data)

    lines = asyncio.run(scenario()).split(b"\n")
    assert [int(line.split()[2]) for line in lines[:-1]] == list(range(4000))
