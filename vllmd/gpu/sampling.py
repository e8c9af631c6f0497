"""The sampler's keeper: starts it, reads its lines, notices the driver call that does not return, and replaces it.

What is stuck in a driver cannot be ended (SIGKILL waits for the call), so it is left behind; another one is started after a
pause that doubles, and none while too many are left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllmd
from vllmd.gpu.sampler import BACK_OFF, STAGE, STAGE_BYTES

_PASSED_ON = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "LC_", "NVIDIA_", "NVML_")
_LINE_BYTES = 4 << 20
_CHUNK = 1 << 16
_LEFT_MAX = 3
_REAP_S = 1.0
_LAST_S = 0.1


@dataclass(frozen=True, slots=True)
class Options:
    """`interval_s` between snapshots; a call counts as stuck after `call_timeout_s`: settings of gpu_watch. `drm`: where
    AMD's cards are looked for ('' for the usual place)."""

    interval_s: float = 5.0
    call_timeout_s: float = 15.0
    drm: str = ""


def environ() -> dict[str, str]:
    """Of the child: no secrets, nothing that speaks to systemd."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    home = str(Path(vllmd.__file__).parent.parent)
    return {**passed, "PYTHONPATH": os.pathsep.join([home, *filter(None, sys.path)])}


def command(options: Options, *more: str) -> list[str]:
    drm = ["--drm", options.drm] if options.drm else []
    return [sys.executable, "-P", "-m", "vllmd.gpu.sampler", "--interval", str(options.interval_s), *drm, *more]


class Stage:
    """The memory that a child writes its call in progress into."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("vllmd-gpu-stage", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, STAGE_BYTES)
        self._memory = mmap.mmap(self.fd, STAGE_BYTES)

    @property
    def since(self) -> float:
        return float(STAGE.unpack_from(self._memory)[0])

    @property
    def name(self) -> str:
        name = bytes(self._memory[STAGE.size :]).partition(b"\0")[0].decode(errors="replace")
        return name if name.isprintable() else "?"

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)


class Sampling:
    """`run` until it is cancelled. `line` gets each object that the sampler says; `stuck` the name of a call that does not
    return, once for each child that is stuck."""

    def __init__(self, options: Options, line: Callable[[Mapping[str, Any]], None], stuck: Callable[[str], None]) -> None:
        self._options = options
        self._line = line
        self._stuck = stuck
        self._child: subprocess.Popen[bytes] | None = None
        self._left: list[subprocess.Popen[bytes]] = []
        self._heard_at = 0.0

    @property
    def pid(self) -> int:
        """0 while there is none."""
        return self._child.pid if self._child else 0

    def look(self) -> None:
        """A snapshot at once."""
        if self._child is not None and self._child.stdin is not None:
            with contextlib.suppress(OSError):
                os.write(self._child.stdin.fileno(), b"look\n")

    async def run(self) -> None:
        pause_s = first = min(1.0, self._options.interval_s)
        while True:
            started = time.monotonic()
            try:
                await self._one_life()
            except OSError:
                pass  # no process or descriptor to be had: later
            finally:
                await asyncio.shield(self._end())
            pause_s = first if time.monotonic() - started > BACK_OFF * self._options.interval_s + self._options.call_timeout_s else min(2 * pause_s, BACK_OFF * self._options.interval_s)
            await asyncio.sleep(pause_s)
            while len(self._left) >= _LEFT_MAX:
                await asyncio.sleep(pause_s)
                self._reap_left()

    async def _one_life(self) -> None:
        """Until the child ends, or is stuck."""
        stage = Stage()
        try:
            self._start(stage)
            ended = asyncio.get_running_loop().create_future()
            with self._reading(ended):
                while not ended.done():
                    if name := self._stuck_in(stage):
                        self._stuck(name)
                        return
                    await asyncio.wait([ended], timeout=self._next_look_s(stage))
        finally:
            stage.close()

    def _start(self, stage: Stage) -> None:
        os.set_blocking(stage.fd, True)
        self._child = subprocess.Popen(
            command(self._options, "--stage-fd", str(stage.fd)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ(), pass_fds=[stage.fd], start_new_session=True,
        )  # fmt: skip
        assert self._child.stdout is not None
        assert self._child.stdin is not None
        os.set_blocking(self._child.stdin.fileno(), False)
        os.set_blocking(self._child.stdout.fileno(), False)
        self._heard_at = time.monotonic()

    # -- is it stuck?

    def _stuck_in(self, stage: Stage) -> str:
        now, since = time.monotonic(), stage.since
        if since and now - since >= self._options.call_timeout_s:
            return stage.name
        if now - self._heard_at >= self._options.call_timeout_s + BACK_OFF * self._options.interval_s:
            return "the sampler itself, between two calls"
        return ""

    def _next_look_s(self, stage: Stage) -> float:
        """A call that is in progress is looked at again right when its time is over; else in a quarter of that time."""
        timeout_s, since = self._options.call_timeout_s, stage.since
        return max(0.005, since + timeout_s - time.monotonic()) if since else timeout_s / 4

    # -- what it says

    @contextlib.contextmanager
    def _reading(self, ended: asyncio.Future[None]) -> Any:
        assert self._child is not None
        assert self._child.stdout is not None
        fd, loop, buffer = self._child.stdout.fileno(), asyncio.get_running_loop(), bytearray()

        def read() -> None:
            try:
                piece = os.read(fd, _CHUNK)
            except BlockingIOError:
                return
            buffer.extend(piece)
            if not piece or len(buffer) > _LINE_BYTES:
                loop.remove_reader(fd)
                if not ended.done():
                    ended.set_result(None)
                return
            *lines, rest = bytes(buffer).split(b"\n") if b"\n" in piece else [bytes(buffer)]
            if lines:
                buffer[:] = rest
            for line in lines:
                self._heard(line)

        loop.add_reader(fd, read)
        try:
            yield
        finally:
            loop.remove_reader(fd)

    def _heard(self, line: bytes) -> None:
        self._heard_at = time.monotonic()
        with contextlib.suppress(ValueError, RecursionError):
            words = json.loads(line)
            if isinstance(words, dict):
                self._line(words)

    # -- its end

    async def _end(self) -> None:
        child, self._child = self._child, None
        self._reap_left()
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + _REAP_S
        try:
            while child.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.005)
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the loop itself ends: no turn of it is left
                child.wait(_LAST_S)
            if child.returncode is None:
                self._left.append(child)

    def _reap_left(self) -> None:
        self._left = [child for child in self._left if child.poll() is None]
