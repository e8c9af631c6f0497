"""A cgroup of a test's own that looks as systemd makes one for a unit, below the unified hierarchy wherever it is mounted."""

from __future__ import annotations

import contextlib
import os
from itertools import count
from pathlib import Path
from typing import Self

from tests import procs
from tests.needs import need
from vllmd.system.cgroupnames import unified_mount

_numbers = count(1)


class ServiceCgroup:
    """`path` is .../vllmd-test-PID-N/vllmd@test.service; skips the test where no cgroup can be made."""

    def __init__(self) -> None:
        mount = Path(unified_mount().point or "/nowhere")
        need(os.access(mount, os.W_OK), "a cgroup2 hierarchy that this user may write to")
        self.top = mount / f"vllmd-test-{os.getpid()}-{next(_numbers)}"
        self.path = self.top / "vllmd@test.service"
        self.path.mkdir(parents=True)

    def enter(self, argv: list[str]) -> list[str]:
        """The command that enters the group before it becomes argv."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *argv]

    def groups(self) -> list[Path]:
        """All of it, the innermost first."""
        return sorted((Path(folder) for folder, _, _ in os.walk(self.top)), reverse=True)

    def members(self, prefix: str = "") -> list[int]:
        """Processes in the groups whose name, or whose parent's below the unit, starts with `prefix`."""
        found = []
        for group in self.groups():
            inside = group.relative_to(self.top).parts[1:2]
            if prefix and not (inside and inside[0].startswith(prefix)):
                continue
            with contextlib.suppress(OSError):
                found += [int(line) for line in (group / "cgroup.procs").read_text().split()]
        return [pid for pid in found if procs.is_alive(pid)]

    def remove(self) -> None:
        if (self.top / "cgroup.kill").exists():
            (self.top / "cgroup.kill").write_text("1")
        procs.wait_until("an empty cgroup", lambda: "populated 0" in (self.top / "cgroup.events").read_text())
        for group in self.groups():
            group.rmdir()


class PidsLimit:
    """A group that allows so many tasks, in whichever hierarchy has that controller; skips the test where none has."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        top = _hierarchy_of("pids")
        need(top is not None and os.access(top, os.W_OK), "a pids controller in a cgroup hierarchy that this user may write to")
        assert top is not None
        self.path = top / f"vllmd-test-pids-{os.getpid()}-{next(_numbers)}"
        self.path.mkdir()
        (self.path / "pids.max").write_text(str(limit))

    def enter(self, argv: list[str]) -> list[str]:
        """The command that enters the group before it becomes argv."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *argv]

    def is_full(self) -> bool:
        return int((self.path / "pids.current").read_text()) >= self.limit

    def close(self) -> None:
        procs.kill_all(int(line) for line in (self.path / "cgroup.procs").read_text().split())
        procs.wait_until("an empty group", lambda: not (self.path / "cgroup.procs").read_text())
        self.path.rmdir()


def _hierarchy_of(controller: str) -> Path | None:
    """Where groups with that controller can be made: the unified hierarchy, if its root hands it on, else its own."""
    unified = Path(unified_mount().point or "/nowhere")
    with contextlib.suppress(OSError):
        if controller in (unified / "cgroup.subtree_control").read_text().split():
            return unified
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        if kind.startswith("cgroup ") and controller in kind.split()[-1].split(","):
            return Path(place.split()[4])
    return None


class Frozen:
    """Processes that sit in the kernel in state D and do not die of SIGKILL, as in a driver's call: those in a frozen group of
    the old freezer. They die when it closes. Skips the test where there is no such hierarchy."""

    def __init__(self) -> None:
        top = _hierarchy_of("freezer")
        need(top is not None and os.access(top, os.W_OK), "the old freezer, in a hierarchy that this user may write to")
        assert top is not None
        self.path = top / f"vllmd-test-frozen-{os.getpid()}-{next(_numbers)}"
        self.path.mkdir()

    def freeze(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))
        (self.path / "freezer.state").write_text("FROZEN")
        procs.wait_until("state D", lambda: (self.path / "freezer.state").read_text() == "FROZEN\n")

    def thaw(self) -> None:
        (self.path / "freezer.state").write_text("THAWED")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        procs.kill_all(int(line) for line in (self.path / "cgroup.procs").read_text().split())
        procs.wait_until("an empty group", lambda: not (self.path / "cgroup.procs").read_text())
        self.path.rmdir()
