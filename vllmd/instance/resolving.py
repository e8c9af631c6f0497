"""The resolve stage, seen from the daemon: a child that speaks JSON lines and is killed when it is no longer wanted."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Callable, Mapping

from vllmd.config.settings import Model
from vllmd.errors import EngineFailed, TryLater, VllmdError
from vllmd.models import wire
from vllmd.models.progress import Progress
from vllmd.system import credentials

LINE_LIMIT = 1 << 20
KILL_S = 0.5


async def resolve(
    request: bytes, environ: Mapping[str, str], on_event: Callable[[Progress | wire.Resolved | wire.Verified], None]
) -> None:
    """Runs the child to its end; raises the VllmdError that it reported. Cancelling kills it."""
    child = _start(environ)
    try:
        await _converse(child, request, on_event)
    finally:
        child.kill()
        # One that reads from a dead network file system cannot be killed; it must not hold the daemon.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(KILL_S)
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


_NOT_ITS_OWN = ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_")


def child_environ(environ: Mapping[str, str], settings: Model) -> dict[str, str]:
    """What the child needs: of the secrets only those of the sources that it may ask. A token that is a setting comes in its
    request, systemd's credentials lie in files."""
    wanted = ("HUGGING_FACE_", *(("AWS_",) if settings.r2_bucket else ()))
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(_NOT_ITS_OWN) and (not credentials.is_secret(name) or name.startswith(wanted))
    }


def _start(environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "vllmd.models.fetch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environ),
            start_new_session=True,
        )
    except BlockingIOError as error:
        what, hint = f"cannot start a process: {error.strerror}", "Raise TasksMax= of the unit (`ulimit -u`), or end some processes."
        raise TryLater("spawn_failed", what, hint) from error


async def _converse(
    child: subprocess.Popen[bytes],
    request: bytes,
    on_event: Callable[[Progress | wire.Resolved | wire.Verified], None],
) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(request)  # far below a pipe's 64 KiB: does not block
    child.stdin.flush()
    reader = asyncio.StreamReader(limit=LINE_LIMIT)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), child.stdout
    )
    verified = False
    try:
        while line := await reader.readline():
            event = wire.decode_event(line)
            if isinstance(event, wire.Failed):
                raise event.error
            verified = verified or isinstance(event, wire.Verified)
            on_event(event)
    finally:
        transport.close()
    if not verified:
        raise _died()


def _died() -> VllmdError:
    what = "the resolver ended without an answer"
    return EngineFailed("resolver_died", what, "its last lines are in the journal; was it killed for want of memory?")
