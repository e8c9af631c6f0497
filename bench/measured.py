"""One command, from its start to its end: time, CPU of it and all that it waited for, and the most memory that it had."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.place import BenchError

LOOK_S = 0.02
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Cost:
    """`memory_mib` is the peak of its resident memory, of the process itself (no peer here has children)."""

    seconds: float
    cpu_s: float
    memory_mib: float
    words: str = ""
    """What it said."""


def cost(argv: Sequence[str], environ: Mapping[str, str], directory: Path) -> Cost:
    """BenchError with its last words where it fails, or takes minutes."""
    log = directory / "words"
    with log.open("wb") as words:
        began = time.monotonic()
        process = subprocess.Popen(argv, env=dict(environ), cwd=directory, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
        peak = 0.0
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            # Not ru_maxrss, which begins with the memory of whoever forked.
            peak = max(peak, _peak_mib(process.pid))
            if time.monotonic() - began > TIMEOUT_S:
                process.kill()
            time.sleep(LOOK_S)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"{argv[0]} ended with {process.returncode}: {log.read_text(errors='replace')[-600:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peak, log.read_text(errors="replace"))


def _peak_mib(pid: int) -> float:
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0
