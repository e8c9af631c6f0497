"""A cgroup of the benchmark's own that looks as systemd makes one for a unit, below the unified hierarchy."""

from __future__ import annotations

import contextlib
import os
import time
from itertools import count
from pathlib import Path

from vllmd.system.cgroupnames import unified_mount

_numbers = count(1)


def available() -> bool:
    point = unified_mount().point
    return bool(point) and os.access(point, os.W_OK)


class ServiceGroup:
    """`path` is .../vllmd-bench-PID-N/vllmd@bench.service."""

    def __init__(self) -> None:
        self.top = Path(unified_mount().point) / f"vllmd-bench-{os.getpid()}-{next(_numbers)}"
        self.path = self.top / "vllmd@bench.service"
        self.path.mkdir(parents=True)

    def enter(self, argv: list[str]) -> list[str]:
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *argv]

    def engine_group(self) -> Path:
        (group,) = self.path.glob("engine-*")
        return group

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            (self.top / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + 10
        while self.top.exists() and time.monotonic() < deadline:
            for folder, _, _ in os.walk(self.top, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
            time.sleep(0.01)
