"""A machine with a real systemd as its PID 1, in a fraction of a second: systemd-nspawn over a tree that stays as it is.

What is written inside lies in memory and goes with the container. Each has a control group of its own: two that share
their caller's collide. Nothing outlives this process: nspawn gets a signal when it dies, and takes its children along.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TypeVar

BOOT_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 30.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_WITH_CGROUP = 'echo $$ >"$0" && exec "$@"'
_numbers = count(1)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done:
    """A command that ended inside."""

    status: int
    out: str
    err: str


class Container:
    """`with Container(tree, binds) as machine:` boots it; `binds` maps places inside to directories outside, read-only. What is written
    inside is kept in `disk` where one is given: the next container with it is the same machine after a reboot."""

    def __init__(self, tree: Path, binds: Mapping[str, Path], disk: Path | None = None) -> None:
        self.name = f"vllmd-machine-{os.getpid()}-{next(_numbers)}"
        self._tree = tree
        self._disk = disk
        self._binds = dict(binds)
        self._cgroup = cgroup2_mount() / own_cgroup() / self.name
        self._nspawn: subprocess.Popen[str] | None = None
        self.init = 0
        """PID 1 of the container, as this machine numbers it."""

    def __enter__(self) -> Container:
        try:
            self._spawn()
            self.init = wait_for(self._find_init, BOOT_TIMEOUT_S, f"the container's PID 1; nspawn said: {self._said()}")
            wait_for(self._is_up, BOOT_TIMEOUT_S, "systemd in the container")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    # -- what is done inside

    def run(self, *argv: str, timeout_s: float = 60.0, env: Mapping[str, str] | None = None, check: bool = True) -> Done:
        """Runs a command as root inside, in no unit. With `check`, a failure fails the test with what it printed."""
        given = {"PATH": _PATH, "LANG": "C.UTF-8", "HOME": "/root", "SYSTEMD_PAGER": "cat", **(env or {})}
        words = ["env", "-i", *(f"{key}={value}" for key, value in given.items()), "timeout", "-k", "5", str(timeout_s), *argv]
        done = subprocess.run(
            [*self._enter("-a"), *words], capture_output=True, text=True, errors="replace", timeout=timeout_s + 20, stdin=subprocess.DEVNULL, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(argv)}: exit status {done.returncode}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
        return Done(done.returncode, done.stdout, done.stderr)

    def _enter(self, *namespaces: str) -> list[str]:
        return ["nsenter", "-t", str(self.init), *namespaces, "--"]

    def path(self, inside: str) -> Path:
        """A place inside, as a path outside (no symlink on the way may be absolute)."""
        return Path(f"/proc/{self.init}/root{inside}")

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        target = self.path(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def processes(self, user: str) -> dict[int, str]:
        """Processes of a user inside: the container's pid and command line, zombies included."""
        uid = next(line.split(":")[2] for line in self.path("/etc/passwd").read_text().splitlines() if line.startswith(f"{user}:"))
        found = {}
        for entry in self.path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                status = (entry / "status").read_text()
                if f"\nUid:\t{uid}\t" in status:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    found[int(entry.name)] = command or status.splitlines()[0]
        return found

    # -- its life

    def _spawn(self) -> None:
        sweep_cgroups(self._cgroup.parent)
        self._cgroup.mkdir()
        nspawn = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--boot"]
        nspawn += [f"--directory={self._root()}", f"--machine={self.name}", *(f"--bind-ro={source}:{inside}" for inside, source in self._binds.items())]
        nspawn += ["--volatile=overlay"] if self._disk is None else []
        self._log = self._cgroup_log()
        self._nspawn = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "sh", "-c", _WITH_CGROUP, str(self._cgroup / "cgroup.procs"), *self._mounted(), *nspawn],
            env={"PATH": _PATH, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            text=True,
        )

    def _root(self) -> Path:
        return self._tree if self._disk is None else self._disk / "root"

    def _mounted(self) -> list[str]:
        """A mount that nobody else sees, and that ends with nspawn."""
        if self._disk is None:
            return []
        for name in ("upper", "work", "root"):
            (self._disk / name).mkdir(mode=0o755, exist_ok=True)
        layers = f"lowerdir={self._tree},upperdir={self._disk}/upper,workdir={self._disk}/work"
        return ["unshare", "--mount", "sh", "-c", f'mount -t overlay overlay -o "{layers}" "{self._disk}/root" && exec "$@"', "sh"]

    def _cgroup_log(self) -> int:
        return os.memfd_create(f"{self.name}.log")

    def _said(self) -> str:
        return os.pread(self._log, 4000, 0).decode(errors="replace")

    def _find_init(self) -> int:
        """The process that its own pid namespace numbers 1: systemd moves it to init.scope, below nspawn's payload."""
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise AssertionError(f"systemd-nspawn exited with {self._nspawn.returncode}: {self._said()}")
        with contextlib.suppress(OSError):
            for pid in (self._cgroup / "payload/init.scope/cgroup.procs").read_text().split():
                numbers = Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].splitlines()[0].split()
                if numbers[-1] == "1":
                    return int(pid)
        return 0

    def _is_up(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False).out.strip() in ("running", "degraded")

    def _end(self) -> None:
        """Asks systemd to power off, kills what does not; idempotent."""
        nspawn, self._nspawn = self._nspawn, None
        if nspawn is None:
            return
        _signal(self.init, signal.SIGRTMIN + 4)
        try:
            nspawn.wait(SHUTDOWN_TIMEOUT_S if self.init else 0.1)
        except subprocess.TimeoutExpired:
            _signal(self.init, signal.SIGKILL)
            nspawn.kill()
            nspawn.wait()
        os.close(self._log)
        remove_cgroup(self._cgroup)


def _signal(pid: int, number: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def remove_cgroup(root: Path) -> None:
    """Kills what is left in a control group of ours, and removes it with everything below."""
    deadline = time.monotonic() + 10
    while root.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            (root / "cgroup.kill").write_text("1")
        for directory in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                directory.rmdir()
        with contextlib.suppress(OSError):
            root.rmdir()
        time.sleep(0.02)


def sweep_cgroups(parent: Path) -> None:
    """Removes what test runs left that were killed; their containers died with them."""
    for left in parent.glob("vllmd-machine-*-*"):
        if not Path("/proc", left.name.split("-")[2]).exists():
            remove_cgroup(left)


def cgroup2_mount() -> Path:
    """Where the unified hierarchy is mounted: /sys/fs/cgroup, or below it beside version 1."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return Path(line.split()[1])
    raise RuntimeError("no cgroup2 is mounted")


def own_cgroup() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next(line for line in lines if line.startswith("0::")).removeprefix("0::/").removesuffix("/")


def wait_for(look: Callable[[], T | None], timeout_s: float, what: str, interval_s: float = 0.05) -> T:
    """The first true value that `look` returns; fails the test, naming `what`, when the time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}; last seen: {found!r}")
        time.sleep(interval_s)
