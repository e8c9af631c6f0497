"""What the kernel counted: the launch's cgroup and its unit's, the host's memory and pressure, its lines on GPUs and memory."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from pathlib import Path

from vllmd.instance.evidence_sheet import Sheet
from vllmd.preflight import child
from vllmd.system.threads import in_thread

_GROUP = (
    "memory.current", "memory.peak", "memory.max", "memory.high", "memory.swap.current", "memory.swap.max", "memory.events", "memory.events.local",
    "memory.pressure", "cpu.pressure", "io.pressure", "cpu.max", "cpu.stat", "pids.current", "pids.max", "pids.events", "memory.stat",
)  # fmt: skip
_HOST = ("/proc/loadavg", "/proc/pressure/memory", "/proc/pressure/cpu", "/proc/pressure/io", "/proc/meminfo")
_FILE_BYTES = 16 << 10
KERNEL_LINES, KERNEL_S, SINCE_S = 200, 2.0, 900
_OF_INTEREST = re.compile(
    r"NVRM|Xid|nvidia|amdgpu|\bGPU\b|oom|Out of memory|Killed process|Memory cgroup|segfault|general protection|traps:|blocked for more than|I/O error|EXT4-fs|XFS|nvme",
    re.IGNORECASE,
)
_GIB = 1 << 30


def read(path: Path | str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return (file.read(_FILE_BYTES) or b"").decode(errors="replace")
    except OSError:
        return ""


async def accounts(sheet: Sheet, group: str) -> None:
    """`group` is the launch's cgroup directory, '' for none. Its parent's is the unit's, where the limits stand."""
    folders = [Path(group), Path(group).parent] if group else []

    def look() -> None:
        for folder in folders:
            sheet.add(f"=== {folder}\n")
            for name in _GROUP:
                text = read(folder / name)
                if text:
                    sheet.add(f"{name}:{' ' if text.count(chr(10)) <= 1 else chr(10)}{text.rstrip()}\n")
        for path in _HOST:
            sheet.add(f"=== {path}\n{read(path).rstrip()}\n")

    await in_thread(look)


def oom_kills(group: str) -> int | None:
    """Processes of this cgroup that the out-of-memory killer took; None where nobody counts them (no memory controller)."""
    for line in (read(Path(group) / "memory.events") if group else "").splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return None


def host_oom_kills() -> int:
    """Of the whole host, since its boot."""
    found = re.search(r"^oom_kill (\d+)$", read("/proc/vmstat"), re.MULTILINE)
    return int(found[1]) if found else 0


def memory_text(group: str) -> str:
    """'the unit used at most 23.9 GiB of its 24.0 GiB'; '' where it is not counted."""
    if not group:
        return ""
    for folder in (Path(group), Path(group).parent):
        peak, limit = read(folder / "memory.peak").strip(), read(folder / "memory.max").strip()
        if peak.isdigit() and limit.isdigit():
            return f"it used at most {int(peak) / _GIB:.2f} GiB of its {int(limit) / _GIB:.2f} GiB (MemoryMax=)"
    peak = read(Path(group) / "memory.peak").strip()
    return f"it used at most {int(peak) / _GIB:.2f} GiB; the unit has no limit of its own, so the host's memory ran out" if peak.isdigit() else ""


async def kernel_lines(sheet: Sheet) -> None:
    """Of the last quarter of an hour: the journal's where this user may read it, else /dev/kmsg."""
    argv = ["/bin/sh", "-c", 'exec "$0" "$@" 2>/dev/null', "journalctl", "--dmesg", "--boot", "--no-pager", "--output=short-iso", f"--since=-{SINCE_S}s", "--lines=5000"]
    outcome = await in_thread(lambda: child.run(argv, timeout_s=KERNEL_S, environ={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}))
    lines: list[str] | None = outcome.output.splitlines() if outcome.status == 0 else []
    if not any(line and not line.startswith("-- ") for line in lines or ()):
        lines = await in_thread(_kmsg)
    found = [line for line in lines or () if _OF_INTEREST.search(line)]
    sheet.add("\n".join(found[-KERNEL_LINES:]))
    if not found:
        sheet.note = "the kernel's log is not readable for this user" if lines is None else f"no such lines in the last {SINCE_S // 60} minutes"


def _kmsg() -> list[str] | None:
    """The newest records of the ring, None where we may not read it; every read gives one, and none blocks."""
    records: deque[str] = deque(maxlen=5000)
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    try:
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for _ in range(100_000):
            try:
                head, _semicolon, text = os.read(descriptor, 8192).decode(errors="replace").partition(";")
            except BrokenPipeError:  # overwritten while we read
                continue
            except OSError:
                break
            stamp = head.split(",")[2:3]
            seconds = int(stamp[0]) / 1e6 if stamp and stamp[0].isdigit() else 0.0
            if now - seconds > SINCE_S:
                continue
            records.append(f"[{seconds:.6f}] {text.splitlines()[0] if text else ''}")
    finally:
        os.close(descriptor)
    return list(records)
