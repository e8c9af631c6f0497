"""Looking at processes, and ending them to the last one: by session, by a word in their environment, by pid."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37


def wait_until(what: str, condition: Callable[[], T], timeout_s: float = 10.0, every_s: float = 0.01) -> T:
    """The first true value of the condition; AssertionError with `what` when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(every_s)


@dataclass(frozen=True)
class Process:
    pid: int
    ppid: int
    pgid: int
    sid: int
    state: str
    comm: str
    cmdline: str


def processes() -> list[Process]:
    """Every process that has not ended."""
    return [process for process in everything() if not has_ended(process)]


def everything() -> list[Process]:
    found = [read(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208 - names, not paths
    return [process for process in found if process]


def read(pid: int) -> Process | None:
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    state, ppid, pgid, sid = tail.split()[:4]
    return Process(pid, int(ppid), int(pgid), int(sid), state, head.partition("(")[2], command)


def is_alive(pid: int) -> bool:
    process = read(pid)
    return process is not None and not has_ended(process)


def has_ended(process: Process) -> bool:
    """A zombie has, unless other threads of it still run: those keep its memory and sockets, and nobody can reap it."""
    if process.state not in "ZX":
        return False
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{process.pid}/task")) <= 1  # noqa: PTH208
    return True


def environ_of(pid: int) -> dict[str, str]:
    """{} for a process that is gone, or of somebody else."""
    with contextlib.suppress(OSError):
        raw = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(entry.split("=", 1) for entry in raw.split("\0") if "=" in entry)
    return {}


def in_session(sid: int) -> list[Process]:
    return [process for process in processes() if process.sid == sid]


def with_environ(name: str, value: str) -> list[Process]:
    return [process for process in processes() if environ_of(process.pid).get(name) == value]


def shared_memory_of(pid: int) -> set[Path]:
    """The blocks in /dev/shm that a process has mapped: vLLM leaves them behind when it is killed, 400 MB of memory."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        return {Path(line[line.index("/dev/shm/") :]) for line in lines if "/dev/shm/" in line and "(deleted)" not in line}
    return set()


def adopt_orphans() -> None:
    """Makes this test run the parent of whatever its processes leave behind, so that conftest sees it.

    Until the end of the test: what the next one orphans is PID 1's to reap, unless it says so too."""
    set_adopting(adopting=True)


def set_adopting(*, adopting: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopting), 0, 0, 0)


def is_adopting() -> bool:
    found = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(found), 0, 0, 0)
    return bool(found.value)


def kill_all(pids: Iterable[int], timeout_s: float = 10.0) -> None:
    """SIGKILL, then wait until all are gone; reaps those that are ours."""
    wanted = set(pids)
    blocks = set().union(*map(shared_memory_of, wanted))
    for pid in wanted:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(f"the end of {wanted}", lambda: not any(map(is_alive, wanted)), timeout_s)
    reap(wanted)
    for block in blocks:
        block.unlink(missing_ok=True)


def reap(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def reap_adopted() -> None:
    """Our zombies that nobody here has started: what a daemon that ended has left to its subreaper, us. PID 1's job."""
    started = {item.pid for item in gc.get_objects() if isinstance(item, subprocess.Popen) and item.returncode is None}
    reap(each.pid for each in everything() if (each.state, each.ppid) == ("Z", os.getpid()) and each.pid not in started)
