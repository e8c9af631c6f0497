"""Running a child that may never end: its output, or the deadline; what is stuck in a driver is left behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllmd.system import owner

_OUTPUT_LIMIT = 1 << 20
_REAP_S = 1.0
_abandoned: list[subprocess.Popen[bytes]] = []
"""Children in a driver's D state: SIGKILL is pending, nobody waits. Kept, so that no destructor complains of them."""
_running: set[int] = set()
"""Sessions of the children that a thread waits for now."""


def kill_running() -> None:
    """Nobody waits for a result any more: the instance is being stopped. What is stuck in a driver ends when that lets it."""
    for session in list(_running):
        _kill(session)


def _kill(session: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(session, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status` is None when the child did not end by itself. `output` is its stdout, at most 1 MiB."""

    output: str
    timed_out: bool
    status: int | None


def run(argv: Sequence[str], *, timeout_s: float, environ: Mapping[str, str], owned: bool = False) -> Outcome:
    """Run the program in a session of its own. At the deadline the whole session is killed, and waited for no longer
    than a second. `owned`: root runs it as whoever could have written it. OSError when it cannot be executed."""
    deadline = time.monotonic() + timeout_s
    rights = owner.rights(Path(argv[0])) if owned else {}
    child = subprocess.Popen(
        list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=dict(environ), start_new_session=True, **rights
    )
    _running.add(child.pid)
    try:
        return _outcome(child, deadline)
    finally:
        _running.discard(child.pid)


def _outcome(child: subprocess.Popen[bytes], deadline: float) -> Outcome:
    assert child.stdout is not None
    with child.stdout:
        output, ended = _read(child.stdout.fileno(), deadline)
    if not ended or not _reaped(child, deadline):
        _kill(child.pid)
        if not _reaped(child, time.monotonic() + _REAP_S):
            _abandoned.append(child)
        return Outcome(output, timed_out=True, status=None)
    return Outcome(output, timed_out=False, status=child.returncode)


def _read(fd: int, deadline: float) -> tuple[str, bool]:
    """What the child says until it closes its stdout (True) or the deadline. poll, not select: the daemon may have more
    than 1,024 descriptors."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    data = b""
    while len(data) < _OUTPUT_LIMIT:
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            return data.decode(errors="replace"), False
        part = os.read(fd, 65536)
        if not part:
            break
        data += part
    return data.decode(errors="replace"), True


def _reaped(child: subprocess.Popen[bytes], deadline: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(max(0.0, deadline - time.monotonic()))
        return True
    return False
