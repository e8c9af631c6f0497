"""Facts of this host and of single processes, read from /proc; and the monotonic deadline that every wait has."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


def boot_id() -> str:
    """Changes with every boot: what was recorded under another one no longer exists. '' where it cannot be read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def boottime() -> float:
    """Seconds since boot that also count while the machine is suspended, which the monotonic clock's do not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """Of /proc/PID/stat. `start_time` in clock ticks since boot: with the pid it names a process for as long as the host
    is up, while a pid alone is used again."""

    pid: int
    state: str
    ppid: int
    session: int
    start_time: int

    @property
    def is_zombie(self) -> bool:
        return self.state in "ZX"


def process_stat(pid: int | str) -> ProcessStat | None:
    """None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    # the name stands in parentheses and may hold anything, parentheses and spaces too
    fields = text[text.rfind(b")") + 2 :].split()
    if len(fields) < 20:
        return None
    return ProcessStat(int(pid), fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19]))


def start_time(pid: int) -> int:
    """In clock ticks since boot; 0 when there is no such process."""
    stat = process_stat(pid)
    return stat.start_time if stat else 0


def ticks_now() -> int:
    """The clock of start_time: what starts from now on has this or more."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def all_processes() -> list[ProcessStat]:
    """A snapshot; about 15 microseconds per process."""
    return [stat for name in os.listdir("/proc") if name.isdigit() and (stat := process_stat(name))]  # noqa: PTH208


def private_memory_bytes(pid: int | str = "self") -> int:
    """What would be freed if the process ended; 0 where the kernel does not say."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith((b"Private_Clean:", b"Private_Dirty:")))


def cpu_seconds(pid: int | str = "self") -> float:
    """User and system time of one process; 0 when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return 0.0
    fields = text[text.rfind(b")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Deadline:
    """A point of the monotonic clock."""

    __slots__ = ("at",)

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    @property
    def remaining_s(self) -> float:
        """Never negative."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.at
