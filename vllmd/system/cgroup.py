"""The family as a cgroup: nothing leaves it, one write kills it, and the kernel says when it is empty.

The unit's delegated cgroup is split: `supervisor/` for us (processes may live in leaves only), `engine-<launch id>/` for
each launch, so that a leftover in uninterruptible sleep does not keep the next launch's group "populated".
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from vllmd.system.cgroupnames import unified_mount
from vllmd.system.family import LAUNCH_VARIABLE, SWEEP_TIMEOUT_S, Family, Leftover, Socket, holds_socket
from vllmd.system.files import storage_error
from vllmd.system.host import Deadline
from vllmd.system.processfamily import ProcessFamily

__all__ = ["CgroupFamily", "Family", "Leftover", "choose_family", "delegation_refusal", "own_group"]

SUPERVISOR = "supervisor"
PREFIX = "engine-"
KILL_FILE = "cgroup.kill"
_LOOK_S = 0.25
_REMOVE_ROUNDS = 20


class CgroupFamily:
    """`group` is the delegated cgroup's directory. OSError when it cannot be split."""

    def __init__(self, group: Path) -> None:
        self._group = group
        self._dir: Path | None = None
        self._killing = False
        self._adopt()

    @property
    def cgroup_dir(self) -> str:
        return "" if self._dir is None else str(self._dir)

    @property
    def cgroup_path(self) -> str:
        return unified_mount().path(self.cgroup_dir)

    def describe(self) -> str:
        return f"cgroup {self.cgroup_path or unified_mount().path(str(self._group))}"

    def environment(self, launch_id: str) -> Mapping[str, str]:
        return {LAUNCH_VARIABLE: launch_id}

    def prepare(self, launch_id: str) -> None:
        directory = self._group / f"{PREFIX}{launch_id}"
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"make the cgroup {directory}") from error
        # a worker ended by the out-of-memory killer leaves a crippled engine: let it take the whole group
        _try_write(directory / "memory.oom.group", "1")
        self._dir = directory
        self._killing = False

    def pids(self) -> tuple[int, ...]:
        return () if self._dir is None else members(self._dir)

    def contains(self, listener: Socket) -> bool:
        if self._dir is None:
            return False
        if listener.cgroup and (listener.cgroup + "/").startswith(self.cgroup_path + "/"):
            return True
        pids = self.pids()
        return bool(set(listener.pids) & set(pids)) or holds_socket(pids, listener.inode)

    def cpu_s(self) -> float:
        if self._dir is None:
            return 0.0
        with contextlib.suppress(OSError):
            for line in (self._dir / "cpu.stat").read_text().splitlines():
                if line.startswith("usage_usec "):
                    return int(line.split()[1]) / 1e6
        return 0.0

    def kill(self) -> None:
        if self._dir is not None:
            self._killing = True
            kill_group(self._dir)

    async def wait_empty(self, timeout_s: float) -> bool:
        return self._dir is None or await wait_empty(self._dir, timeout_s, killing=self._killing)

    def remove(self) -> bool:
        if self._dir is not None and not remove_group(self._dir):
            return False
        self._dir = None
        return True

    async def sweep(self, timeout_s: float = SWEEP_TIMEOUT_S) -> list[Leftover]:
        old = [path for path in self._group.glob(f"{PREFIX}*") if path != self._dir and path.is_dir()]
        swept = await asyncio.gather(*(_sweep(path, timeout_s) for path in old))
        return [each for each in swept if each.pids or not each.gone]

    def _adopt(self) -> None:
        """Ourselves into the leaf first: a cgroup with processes of its own cannot hand controllers down (EBUSY)."""
        leaf = self._group / SUPERVISOR
        leaf.mkdir(exist_ok=True)
        for pid in _procs(self._group):
            with contextlib.suppress(ProcessLookupError):
                _write(leaf / "cgroup.procs", str(pid))
        for controller in (self._group / "cgroup.controllers").read_text().split():
            _try_write(self._group / "cgroup.subtree_control", f"+{controller}")


async def _sweep(directory: Path, timeout_s: float) -> Leftover:
    pids = members(directory)
    kill_group(directory)
    gone = await wait_empty(directory, timeout_s, killing=True) and remove_group(directory)
    return Leftover(directory.name.removeprefix(PREFIX), pids, gone)


# --- one cgroup


def members(directory: Path) -> tuple[int, ...]:
    """The processes in it and below it."""
    return tuple(pid for folder, _, _ in os.walk(directory) for pid in _procs(Path(folder)))


def kill_group(directory: Path) -> None:
    """One write on Linux 5.14 and newer; before that, freeze it and kill one by one (wait_empty repeats)."""
    try:
        _write(directory / KILL_FILE, "1")
    except FileNotFoundError:
        _try_write(directory / "cgroup.freeze", "1")  # nobody forks while we go through the list; SIGKILL thaws
        for pid in members(directory):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        _try_write(directory / "cgroup.freeze", "0")
    except OSError as error:
        if error.errno != errno.ENODEV:  # removed meanwhile
            raise storage_error(error, f"kill the cgroup {directory}") from error


def is_populated(directory: Path) -> bool:
    try:
        return "populated 1" in (directory / "cgroup.events").read_text()
    except OSError:
        return False


async def wait_empty(directory: Path, timeout_s: float, *, killing: bool = False) -> bool:
    """True when the kernel says 'populated 0', or the group is gone. `killing`: it was killed before; where that was by
    hand, what forked meanwhile is killed too."""
    deadline = Deadline(timeout_s)
    by_hand = killing and not (directory / KILL_FILE).exists()
    with contextlib.closing(_EventsFile(directory)) as events:
        while is_populated(directory):
            if deadline.passed:
                return False
            await events.changed(min(_LOOK_S, deadline.remaining_s))
            if by_hand:
                kill_group(directory)
    return True


class _EventsFile:
    """Waits for a change of cgroup.events. The file is always 'readable', so a plain add_reader on it spins (some
    350,000 wake-ups in a second): it is registered for EPOLLPRI in an epoll of its own, and that is what the loop watches."""

    def __init__(self, directory: Path) -> None:
        self._epoll = select.epoll()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        try:
            self._file = os.open(directory / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1
            return
        os.read(self._file, 1024)
        self._epoll.register(self._file, select.EPOLLPRI)
        self._loop.add_reader(self._epoll.fileno(), self._look)

    def _look(self) -> None:
        self._epoll.poll(0)
        with contextlib.suppress(OSError):  # reading arms it again
            os.pread(self._file, 1024, 0)
        self._changed.set()

    async def changed(self, timeout_s: float) -> None:
        """Returns at the latest after the timeout."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        self._changed.clear()

    def close(self) -> None:
        if self._file >= 0:
            self._loop.remove_reader(self._epoll.fileno())
            os.close(self._file)
            self._file = -1
        self._epoll.close()


def remove_group(directory: Path) -> bool:
    """With the groups that the engine made below it; False while a process is left."""
    for _ in range(_REMOVE_ROUNDS):
        for folder, _, _ in os.walk(directory, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        if not directory.exists():
            return True
        if is_populated(directory):
            return False
        time.sleep(0.002)  # an exit that is just being counted
    return False


def _procs(directory: Path) -> list[int]:
    try:
        return [int(line) for line in (directory / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _try_write(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        _write(path, text)


# --- which cgroup, and whether it is ours


def own_group() -> Path | None:
    """Our own cgroup's directory in the unified hierarchy (also of a hybrid layout); None where there is none to see."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            path = line.removeprefix("0::")
            if path != line and path.startswith("/") and "/.." not in path:
                directory = unified_mount().directory(path)
                return Path(directory) if directory else None
    return None


def delegation_refusal(group: Path | None, environ: Mapping[str, str]) -> str:
    """Why this cgroup is not ours to split; '' when it is. A shell's session and the root are never taken over."""
    if group is None:
        return "no unified cgroup hierarchy is mounted"
    if str(group) == unified_mount().point:
        return "in the root cgroup"
    if set(_procs(group)) != {os.getpid()}:
        return "the cgroup is shared with other processes"
    if not all(os.access(group / name, os.W_OK) for name in (".", "cgroup.procs", "cgroup.subtree_control")):
        return "the cgroup is not writable: the unit needs Delegate=yes, and no ProtectControlGroups="
    if not _is_marked(group) and not (environ.get("INVOCATION_ID") and group.name.endswith(".service")):
        return "the cgroup is not delegated to us"
    return ""


def _is_marked(group: Path) -> bool:
    """systemd's own mark; the trusted one is for root's eyes."""
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(group, name) == b"1":
                return True
    return False


def choose_family(environ: Mapping[str, str]) -> CgroupFamily | ProcessFamily:
    """The cgroup where one is delegated to us, else the processes; describe() says which, and why."""
    group = own_group()
    refusal = delegation_refusal(group, environ)
    if refusal or group is None:
        return ProcessFamily(f"no delegated cgroup: {refusal}")
    try:
        return CgroupFamily(group)
    except OSError as error:
        return ProcessFamily(f"the cgroup {group} cannot be split: {error.strerror}")
