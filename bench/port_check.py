"""The port check with 2,000 processes and 20,000 sockets on the host, beside what people use for it otherwise.

    python -m bench.port_check [PROCESSES [SOCKETS]]

Makes its own sockets (in ten of the processes) and processes, in a cgroup of its own where there is a cgroup2 to write
to, and ends them. Half of the sockets listen, half are connected. Times are medians, in one run, one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllmd.core.plan import Endpoint
from vllmd.preflight import ports
from vllmd.preflight.attribution import attribute
from vllmd.system import cgroupnames, procfs, sockdiag

BAR_MS = 3.0
PR_SET_PDEATHSIG = 1
HOLDERS = 10
ROUNDS = 15


@dataclass(frozen=True)
class Row:
    """One way to answer; `bar_ms` 0 where nothing was promised, `milliseconds` None where the tool is missing."""

    what: str
    milliseconds: float | None
    bar_ms: float = 0.0

    def __str__(self) -> str:
        took = "not installed" if self.milliseconds is None else f"{self.milliseconds:10.3f} ms"
        verdict = "" if not self.bar_ms or self.milliseconds is None else ("  ok" if self.milliseconds <= self.bar_ms else f"  OVER {self.bar_ms:g} ms")
        return f"{self.what:<72} {took}{verdict}"


def _hold_sockets(count: int) -> None:
    """In a child: half of them listening, the rest pairs of connected ones."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, max(count + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
    held = []
    for _ in range(count // 2):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        held.append(listener)
    for number in range(count // 4):
        held.append(socket.create_connection(held[number].getsockname()))
        held.append(held[number].accept()[0])
    os.write(1, b".")
    signal.pause()


@contextlib.contextmanager
def crowd(processes: int, sockets: int) -> Iterator[None]:
    """The processes and sockets, until the end of the block."""
    pids = []
    reader, writer = os.pipe()
    try:
        for number in range(processes):
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a Ctrl-C can come before it is listed
                    os.dup2(writer, 1)
                    if number < HOLDERS:
                        _hold_sockets(sockets // HOLDERS)
                    signal.pause()
                os._exit(0)
            pids.append(pid)
        for _ in range(HOLDERS):
            os.read(reader, 1)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def server(port: int, group: Path | None) -> Iterator[int]:
    """The process whose port it is, in the group."""
    script = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print('.', flush=True); time.sleep(600)"
    enter = ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"] if group else []
    with subprocess.Popen([*enter, sys.executable, "-c", script, str(port)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        try:
            yield child.pid
        finally:
            child.kill()


@contextlib.contextmanager
def unit_group() -> Iterator[Path | None]:
    """A cgroup as a unit has one; None where it cannot be made."""
    mount = Path(cgroupnames.unified_mount().point or "/nowhere")
    group = mount / f"vllmd-bench-{os.getpid()}.service"
    if not os.access(mount, os.W_OK):
        yield None
        return
    group.mkdir()
    try:
        yield group
    finally:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.01)


def _median_ms(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _check(port: int) -> None:
    """What preflight does: the bind, and where it fails, who it is: address, uid, cgroup, unit."""
    verdict, holders = ports.look("127.0.0.1", port)
    assert verdict.is_free or holders


def _walk(port: int) -> None:
    """What psutil does: every descriptor of every process, against /proc/net/tcp."""
    inodes = [each.inode for each in sockdiag._from_proc() if each.port == port]
    assert any(procfs.socket_holders(inodes, procfs.pids()).values())


def _run(*argv: str) -> None:
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _tool(what: str, *argv: str) -> Row:
    return Row(what, _median_ms(lambda: _run(*argv), 3) if shutil.which(argv[0]) else None)


def run(processes: int = 2000, sockets: int = 20000) -> list[Row]:
    """The table's rows. Takes about half a minute."""
    free, busy, loose, bound = itertools.islice(_free_ports(), 4)
    with socket.socket() as silent, crowd(processes, sockets), unit_group() as group, server(busy, group), server(loose, None):
        silent.bind(("127.0.0.1", bound))
        endpoint = Endpoint("tcp", "127.0.0.1", busy)
        return [
            Row("port free: exclusive bind", _median_ms(lambda: _check(free)), BAR_MS),
            Row("port held: bind, then address, uid, cgroup and unit by sock_diag", _median_ms(lambda: _check(busy)), BAR_MS),
            Row("  the same with the pid, holder in a cgroup of its own (systemd)", _median_ms(lambda: attribute(ports.look("127.0.0.1", busy)[1])), BAR_MS),
            Row("  the same with the pid, holder in the root cgroup (no systemd)", _median_ms(lambda: attribute(ports.look("127.0.0.1", loose)[1]), 3)),
            Row("who listens on our endpoint (asked at every probe)", _median_ms(lambda: ports.listeners_of(endpoint))),
            Row("port held by a socket that is bound and does not listen", _median_ms(lambda: _check(bound))),
            Row("walk over /proc/*/fd, as psutil", _median_ms(lambda: _walk(busy), 3)),
            _tool("ss -ltnp", "ss", "-Hltnp", f"sport = :{busy}"),
            _tool("lsof -iTCP", "lsof", "-nP", f"-iTCP:{busy}", "-sTCP:LISTEN"),
        ]


def _free_ports() -> Iterator[int]:
    """Below the range from which the crowd's sockets get theirs."""
    for port in range(20000, 32000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("0.0.0.0", port))
            yield port


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    for row in run(*words):
        print(row)
