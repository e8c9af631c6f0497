"""Finding and ending what a benchmark started, by a mark in its environment, and what it costs to run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Iterable
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes us the parent of what our processes leave behind, so that nothing of it stays a zombie."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def marked(name: str, value: str) -> list[int]:
    """Every process but ourselves with that word in its environment."""
    word = f"{name}={value}".encode()
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names, not paths
        with contextlib.suppress(OSError):
            if entry.isdigit() and int(entry) != os.getpid() and word in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(int(entry))
    return found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    return False


def end(pids: Iterable[int], timeout_s: float = 10.0) -> None:
    """SIGKILL, and waits until all are gone. What they shared in /dev/shm goes with them: vLLM leaves 400 MB there."""
    wanted = set(pids)
    blocks = set().union(*map(shared_memory, wanted))
    for pid in wanted:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + timeout_s
    while any(map(is_alive, wanted)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for block in blocks:
        block.unlink(missing_ok=True)
    reap(wanted)


def kill_and_wait(pids: Iterable[int]) -> float:
    """SIGKILL to all at once; the seconds until the last is gone: what the kernel needs to free their memory."""
    with contextlib.ExitStack() as stack:
        fds = [os.pidfd_open(pid) for pid in pids if is_alive(pid)]
        for fd in fds:
            stack.callback(os.close, fd)
        began = time.monotonic()
        for fd in fds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        for fd in fds:
            select.select([fd], [], [], 30)
        return time.monotonic() - began


def reap(pids: Iterable[int]) -> None:
    """Only those that nobody waits for: the daemon itself is its starter's to wait for."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z":
                os.waitpid(pid, os.WNOHANG)


def shared_memory(pid: int) -> set[Path]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        return {Path(line[line.index("/dev/shm/") :]) for line in lines if "/dev/shm/" in line and "(deleted)" not in line}
    return set()


def cpu_ns(pid: int) -> int:
    """CPU time of all its threads that live, by the scheduler's own count (ticks are too coarse: 10 ms)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total


def private_mib(pid: int) -> float:
    """Memory that would come back if it ended: Private_Clean and Private_Dirty of smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
