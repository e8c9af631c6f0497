"""The engine's main process: started by way of the launcher, watched and signalled by pidfd, never by number.

A pid can be another process's by the time a signal is sent; a pidfd cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllmd.errors import ConfigError, EngineFailed, PermissionMissing, TryLater, VllmdError
from vllmd.system.files import exhausted
from vllmd.system.host import start_time

_LAUNCHER = str(Path(__file__).with_name("launcher.py"))
_LINK = 3
_HIGH = 10
"""Descriptors meant for the child are first moved above those it gets: no dup2 can then overwrite another's source."""
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENOEXEC}


@dataclass(frozen=True, slots=True)
class SpawnSpec:
    """What to execute and as what. `argv[0]` is an absolute path; `env` is all of the environment; `cgroup` is the
    directory of the cgroup to enter: without one the kernel kills the process when the supervisor dies (PDEATHSIG)."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cgroup: str = ""
    cwd: str = "/"
    umask: int = 0o022
    oom_score_adj: int | None = None


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """One of `code` and `signal` is set; neither where somebody else took the status (a bug, but no reason to hang)."""

    code: int | None = None
    signal: int | None = None
    core_dumped: bool = False

    def describe(self) -> str:
        """'exit status 1', 'killed by SIGKILL'."""
        if self.signal is not None:
            names = {int(each): each.name for each in signal.Signals}  # the real-time ones have none
            name = names.get(self.signal, f"signal {self.signal}")
            return f"killed by {name}" + (" (core dumped)" if self.core_dumped else "")
        return "exit status unknown" if self.code is None else f"exit status {self.code}"


class Child:
    """The running main process. `stdout` and `stderr` are descriptors of pipes, the caller's to
    close (LineReader does)."""

    def __init__(self, pid: int, stdout: int, stderr: int) -> None:
        self.pid = pid
        self.start_time = start_time(pid)
        self.stdout = stdout
        self.stderr = stderr
        self.pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._loop.add_reader(self.pidfd, self._reap)

    @property
    def exit_status(self) -> ExitStatus | None:
        """None while it runs."""
        return self._exit.result() if self._exit.done() else None

    async def wait(self) -> ExitStatus:
        """Of this process only: its children may live on (the family knows). Any number may wait."""
        return await asyncio.shield(self._exit)

    def signal(self, number: int) -> bool:
        """False when it is gone already."""
        if self._exit.done() or self.pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """Let go of the pidfd, once it has exited or is given up. Idempotent."""
        if self.pidfd >= 0:
            self._loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1

    def _reap(self) -> None:
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            status = ExitStatus()
        else:
            if result is None:
                return
            status = _exit_status(result.si_code, result.si_status)
        self._loop.remove_reader(self.pidfd)
        if not self._exit.done():
            self._exit.set_result(status)

    def _destroy(self) -> None:
        """A launch that failed: nothing of it stays, not even its descriptors. Blocks until it is dead, for five seconds at most."""
        self.signal(signal.SIGKILL)
        if not self._exit.done():
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if poll.poll(5000):
                self._reap()
        self.close()
        os.close(self.stdout)
        os.close(self.stderr)


def _exit_status(kind: int, value: int) -> ExitStatus:
    if kind == os.CLD_EXITED:
        return ExitStatus(code=value)
    return ExitStatus(signal=value, core_dumped=kind == os.CLD_DUMPED)


async def spawn(spec: SpawnSpec, before_exec: Callable[[int, int], None], *, timeout_s: float = 10.0) -> Child:
    """Start the engine. `before_exec(pid, start_time)` is called when the process is in its cgroup and not yet the engine:
    what it writes (launch.json) is on disk before anything can be left behind. Errors: ConfigError (the program is
    absent or none), PermissionMissing, EngineFailed, TryLater; whatever before_exec raises. After an error nothing is left.
    """
    with contextlib.ExitStack() as stack:
        link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        stack.enter_context(link)
        with theirs:
            child = _start(spec, theirs)
        link.settimeout(0)
        try:
            async with asyncio.timeout(timeout_s):
                await _shake_hands(link, spec, child, before_exec)
            # a cancellation that came while nothing had to be waited for is delivered here, not to a caller who would
            # then never see the child
            await asyncio.sleep(0)
        except TimeoutError:
            child._destroy()
            raise TryLater("launch_timeout", f"the launcher did not get ready within {timeout_s:g} s", "The host is overloaded; see `uptime`.") from None
        except BaseException:
            child._destroy()
            raise
        return child


def _start(spec: SpawnSpec, link: socket.socket) -> Child:
    stdout, stdout_write = os.pipe()
    stderr, stderr_write = os.pipe()
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pid = _posix_spawn(spec, [null, stdout_write, stderr_write, link.fileno()])
        return Child(pid, stdout, stderr)
    except OSError as error:
        os.close(stdout)
        os.close(stderr)
        what = "cannot start a process"
        other = TryLater("spawn_failed", f"{what}: {error.strerror}", "Raise TasksMax= of the unit (`ulimit -u`), or end some processes.")
        raise exhausted(error, what) or other from error
    finally:
        for descriptor in (null, stdout_write, stderr_write):
            os.close(descriptor)


def _posix_spawn(spec: SpawnSpec, descriptors: list[int]) -> int:
    """The launcher, with these as its 0, 1, 2 and 3."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH) for descriptor in descriptors]
    environ = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    environ |= {name: value for name, value in spec.env.items() if name == "VLLMD_LAUNCH_ID"}
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", _LAUNCHER, str(_LINK)],
            environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate(high)],
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    finally:
        for descriptor in high:
            os.close(descriptor)


async def _shake_hands(link: socket.socket, spec: SpawnSpec, child: Child, before_exec: Callable[[int, int], None]) -> None:
    loop = asyncio.get_running_loop()
    # a broken link is the launcher's death, told by what is read
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await loop.sock_sendall(link, _specification(spec))
    if (text := await _read_line(link)) != b"entered\n":
        raise _launch_error(spec, text)
    before_exec(child.pid, child.start_time)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await loop.sock_sendall(link, b"g")
    if text := await _read_line(link):
        raise _launch_error(spec, text)


def _specification(spec: SpawnSpec) -> bytes:
    value = {
        "argv": spec.argv,
        "env": dict(spec.env),
        "cgroup": spec.cgroup,
        "pdeathsig": not spec.cgroup,
        "parent": os.getpid(),
        "cwd": spec.cwd,
        "umask": spec.umask,
        "oom_score_adj": spec.oom_score_adj,
    }
    return json.dumps(value).encode() + b"\n"


async def _read_line(link: socket.socket) -> bytes:
    """b'' when the link ended: by the exec, or by the launcher's death."""
    text = b""
    while not text.endswith(b"\n"):
        try:
            piece = await asyncio.get_running_loop().sock_recv(link, 4096)
        except ConnectionResetError:
            piece = b""
        if not piece:
            return b""
        text += piece
    return text


def _launch_error(spec: SpawnSpec, text: bytes) -> VllmdError:
    if not text:
        return EngineFailed("launcher_failed", "the launcher ended before it could execute the engine", "Try again; the kernel's log (`journalctl -k`) may say more.")
    report = json.loads(text)
    number, step, path = int(report["errno"]), str(report["step"]), str(report["path"])
    return _step_error(step, path, number, os.strerror(number), spec)


def _step_error(step: str, path: str, number: int, reason: str, spec: SpawnSpec) -> VllmdError:
    denied = number in (errno.EACCES, errno.EPERM)
    if step == "cgroup":
        hint = "The unit needs Delegate=yes and no ProtectControlGroups=."
        return (PermissionMissing if denied else EngineFailed)("cgroup_enter_failed", f"cannot enter the cgroup {path}: {reason}", hint)
    if step == "directory":
        hint = f"It must exist and be accessible to user {os.geteuid()}."
        return (PermissionMissing if denied else ConfigError)("directory_missing", f"cannot change to {path}: {reason}", hint)
    if step != "exec":
        return EngineFailed("launcher_failed", f"cannot set up the engine's process ({step}): {reason}", "")
    if denied:
        return PermissionMissing("engine_not_executable", f"cannot execute {path}: {reason}", f"`chmod +x` it, or see whether its file system is mounted noexec; user {os.geteuid()} runs it.")
    if number in _ABSENT:
        where = f"cannot execute {path}: {reason}"
        if number == errno.ENOENT and Path(path).exists():
            where = f"cannot execute {path}: the interpreter that its first line names is missing"
        return ConfigError("engine_missing", where, "`vllmctl engine install` installs one; engine.executable names another.")
    size = sum(map(len, spec.argv)) + sum(len(name) + len(value) for name, value in spec.env.items())
    return EngineFailed("engine_exec_failed", f"cannot execute {path}: {reason}", f"Arguments and environment have {size} bytes." if number == errno.E2BIG else "")
