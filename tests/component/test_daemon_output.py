"""Engines that say nothing, too much, or nonsense, and a journal that nobody reads: neither blocks anybody."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests import procs
from tests.component.daemons import Tampered, quick, stop
from tests.harness import Instance
from tests.needs import need

pytestmark = pytest.mark.component


def test_a_silent_engine_becomes_ready() -> None:
    with quick({"FAKE_OUTPUT": "silent"}) as instance:
        instance.wait_ready()
        assert "engine |" not in instance.log()
        stop(instance)


def written_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/io").read_text()
    return int(text.split("wchar: ")[1].split()[0])


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_flooding_engine_is_neither_blocked_nor_blocks() -> None:
    """It writes as fast as it is read; what is above the rate is counted and thrown away."""
    with quick({"FAKE_OUTPUT": "flood"}, {"log": {"lines_per_s": 50}}, watchdog_s=2) as instance:
        instance.wait_ready()
        engine = instance.engine_process("vllm").pid
        before, began = written_bytes(engine), time.monotonic()
        procs.wait_until("100 MB more", lambda: written_bytes(engine) - before > 100e6, 30)
        rate = (written_bytes(engine) - before) / (time.monotonic() - began)
        assert rate > 10e6
        asked = time.monotonic()
        assert instance.ask("/health")[0] == 200
        assert instance.status()["state"] == "ready"
        assert time.monotonic() - asked < 2
        procs.wait_until("the drops are said", lambda: "it logs too fast" in instance.log())
        assert 'what="engine_lines"} 0.0' not in instance.control("/metrics")[1]
        pings = [message.at for message in instance.notify.messages if message.get("WATCHDOG")]
        assert max(b - a for a, b in pairwise(pings)) < 2
        lines = instance.log().count("engine |")
        assert lines < 50 * (time.monotonic() - began + 30)
        assert resident_mib(instance.pid) < 100
        asked = time.monotonic()
        stop(instance)
        assert time.monotonic() - asked < 10


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def test_a_line_of_ten_megabytes_is_cut() -> None:
    with quick({"FAKE_OUTPUT": "long", "FAKE_OUTPUT_MB": "30"}) as instance:
        instance.wait_ready()
        procs.wait_until("the cut line", lambda: " bytes cut]" in instance.log())
        assert max(map(len, instance.log().splitlines())) < 20000
        assert instance.status()["state"] == "ready"
        stop(instance)


def test_broken_text_is_shown_as_text() -> None:
    with quick({"FAKE_OUTPUT": "broken"}) as instance:
        instance.wait_ready()
        procs.wait_until("the line", lambda: "half a euro" in instance.log())
        stop(instance)
        raw = (instance.root / "demo.err").read_bytes()
        raw.decode("utf-8")  # strict
        assert b"\0" not in raw
        assert b"\x1b[31m" not in raw, "an engine must not paint the terminal"
        assert all("\0" not in line for line in instance.last_json()["lines"])


def test_output_that_nobody_reads_blocks_nobody() -> None:
    """`make run | less`: a pipe that is full for ever."""

    class Piped(Tampered):
        def command(self, *arguments: str) -> list[str]:
            argv = super().command(*arguments)
            return ["/bin/sh", "-c", '"$@" 2>&1 | sleep 1000', "sh", *argv]

    instance = Piped(fake={"FAKE_START_S": "0.1", "FAKE_OUTPUT": "flood"}, config={"gpus": "none"})
    with instance:
        instance.notify.wait(lambda message: message.get("READY") == "1", 30, lambda: False)
        daemon = instance.wait_ready().pid
        engine = instance.engine_process("vllm").pid
        before = written_bytes(engine)
        procs.wait_until("the engine is still read", lambda: written_bytes(engine) - before > 20e6, 30)
        assert instance.status()["state"] == "ready"
        os.kill(daemon, 15)
        instance.wait_notify(lambda message: message.get("STATUS") == "Stopped")
        procs.wait_until("its end", lambda: not procs.is_alive(daemon))
        assert instance.engine() == []


# The journal

RUN = 'mount -t tmpfs run /run && mkdir -p /run/systemd/journal && mount --bind "$0" /run/systemd/journal && exec "$@"'


@contextlib.contextmanager
def journal(instance: Tampered, *, read: bool) -> Iterator[socket.socket]:
    """A socket where the daemon, in a mount namespace of its own, sees journald's."""
    need(os.geteuid() == 0, "root")
    folder = instance.root / "journal"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(folder / "socket"))
        if not read:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        instance.before = ("unshare", "--mount", "--propagation", "private", "sh", "-c", RUN, str(folder))
        yield listener


def entries(listener: socket.socket) -> Iterator[dict[str, str]]:
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            text = listener.recv(1 << 20).decode(errors="replace")
            yield dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def collect(listener: socket.socket, event: str) -> list[dict[str, str]]:
    """All entries up to that event: the queue of such a socket has ten places, so it must be read all the while."""
    found: list[dict[str, str]] = []

    def has_come() -> bool:
        found.extend(entries(listener))
        return any(entry.get("VLLMD_EVENT") == event for entry in found)

    procs.wait_until(event, has_come, 30)
    return found


def test_the_journal_gets_events_and_lines_with_their_fields() -> None:
    instance = Tampered.quick(fake={"FAKE_DEATH_S": "0.1"})
    with journal(instance, read=True) as listener, instance:
        found = collect(listener, "engine-ready")
        launch = instance.status()["launch_id"]
        lines = [entry for entry in found if entry["SYSLOG_IDENTIFIER"] == "vllmd-engine"]
        events = [entry for entry in found if entry["SYSLOG_IDENTIFIER"] == "vllmd"]
        assert all(entry["VLLMD_INSTANCE"] == "demo" for entry in found)
        assert all(entry["VLLMD_LAUNCH"] == launch for entry in lines)
        assert {"loading-weights"} <= {entry.get("VLLMD_PHASE", "") for entry in lines}
        ready = next(entry for entry in events if entry.get("VLLMD_EVENT") == "engine-ready")
        assert len(ready["MESSAGE_ID"]) == 32
        assert ready["PRIORITY"] == "5"
        instance.kill_engine("VLLM::EngineCore")
        found = collect(listener, "stopped")
        instance.wait_exit()
        assert any(entry["PRIORITY"] == "3" and entry["SYSLOG_IDENTIFIER"] == "vllmd-engine" for entry in found)
        failed = [entry for entry in found if entry.get("VLLMD_EVENT") == "failed"]
        assert failed
        assert failed[-1]["VLLMD_EXIT_STATUS"] == "70"
        assert failed[-1]["VLLMD_HINT"]
        assert instance.log() == "", "nothing twice: stderr goes to the journal as well"


def test_a_journal_that_nobody_reads_harms_nothing() -> None:
    """With journald stopped the usual bindings block after some hundred messages, and the daemon with them."""
    instance = Tampered.quick(fake={"FAKE_OUTPUT": "flood"}, log={"lines_per_s": 20000})
    instance.env["WATCHDOG_USEC"] = "3000000"
    with journal(instance, read=False), instance:
        instance.wait_ready()
        procs.wait_until("drops", lambda: dropped(instance) > 100, 30)
        assert instance.ask("/health")[0] == 200
        stop(instance)
        assert instance.last_json()["status"] == 0


def dropped(instance: Instance) -> float:
    text = instance.control("/metrics")[1]
    return float(text.split('vllmd_dropped_total{name="demo",what="journal"} ')[1].split()[0])


@pytest.mark.parametrize("stderr", ["/dev/full", "&-", "&$broken"], ids=["disk full", "closed", "reader gone"])
def test_a_log_that_cannot_be_written_keeps_nothing_from_starting_and_stopping(stderr: str) -> None:
    """A shell's `2>log` on a full disk, `| head`: the report of what was lost must not be reported as lost, for ever."""
    script = f'exec {{broken}}> >(:); exec "$@" 2>{stderr}'
    with Tampered.quick(before=("bash", "-c", script, "bash"), log={"level": "debug"}) as instance:
        instance.wait_ready()
        instance.signal(signal.SIGHUP)  # says something once more
        assert cpu_s(instance.pid) < 5
        stop(instance)
