"""One reading of the engine's heartbeat over HTTP, as core/pulse wants it; and, where nobody answers, whether they compute."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping

from vllmd.core.pulse import SILENT, Outcome, Rank, Sample
from vllmd.engines.protocol import Beating, Engine
from vllmd.instance.probing import Probe
from vllmd.preflight.ports import listeners_of
from vllmd.system import procfs
from vllmd.system.family import Family
from vllmd.system.host import cpu_seconds
from vllmd.system.http import Answer, request

KEPT_BYTES = 1 << 20
EXCUSE_TIMEOUT_S = 0.7


class Heartbeat:
    """An engine that is not Beating is asked for its health instead: it then shows whether it answers, and no ranks."""

    def __init__(self, engine: Engine, probe: Probe, family: Family) -> None:
        self._engine = engine
        self._endpoint = probe.endpoint
        self._health_path = probe.health_path
        self._headers = probe.headers
        self._family = family
        self.last = b""
        """The last answer as it came, for the evidence of a failure; the beginning of it where it is longer than KEPT_BYTES."""

    async def read(self, timeout_s: float) -> Sample:
        asked_at = time.monotonic()
        outcome, ranks = await self._ask(timeout_s)
        cpu_s, states = self._front() if outcome in SILENT else (0.0, frozenset())
        return Sample(asked_at, time.monotonic(), outcome, ranks, cpu_s, stopped=states == {"T"}, runnable="R" in states)

    async def _ask(self, timeout_s: float) -> tuple[Outcome, Mapping[str, Rank]]:
        engine = self._engine
        if not isinstance(engine, Beating):
            answer = await request(self._endpoint, "GET", self._health_path, headers=self._headers, timeout_s=timeout_s)
            return ("absent", {}) if answer.outcome == "answered" and answer.status != 503 else (_outcome(answer), {})
        reading = engine.heartbeat()
        kept = bytearray()

        def feed(piece: bytes) -> None:
            kept.extend(piece[: KEPT_BYTES - len(kept)])
            reading.feed(piece)

        limit = engine.heartbeat_limit_bytes
        answer = await request(self._endpoint, "GET", engine.heartbeat_path, headers=self._headers, timeout_s=timeout_s, limit_bytes=limit, sink=feed)
        self.last = bytes(kept) or self.last
        return reading.result() if answer.outcome == "answered" and answer.status == 200 else (_outcome(answer), {})

    async def excused(self) -> str:
        """The path that says why it stands still; '' where none does."""
        engine = self._engine
        paths = engine.excuses if isinstance(engine, Beating) else ()
        answers = await asyncio.gather(*(request(self._endpoint, "GET", path, headers=self._headers, timeout_s=EXCUSE_TIMEOUT_S) for path in paths))
        return next((path for path, answer in zip(paths, answers, strict=True) if _says_true(answer)), "")

    def _front(self) -> tuple[float, frozenset[str]]:
        """CPU time of the processes that hold the listening socket, and the states they are in. Of the whole family where
        they cannot be told: workers of some engines spin when they wait, and would be taken for a server that computes."""
        pids = self._family.pids()
        inodes = [listener.inode for listener in listeners_of(self._endpoint) if listener.inode]
        holders = {pid for found in procfs.socket_holders(inodes, pids).values() for pid in found}
        stats = [found for pid in holders if (found := procfs.stat(pid)) is not None]
        if not stats:
            return self._family.cpu_s(), frozenset()
        return sum(map(cpu_seconds, holders)), frozenset(each.state for each in stats)


def _says_true(answer: Answer) -> bool:
    if answer.outcome != "answered" or answer.status != 200:
        return False
    try:
        document = json.loads(answer.body)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and True in document.values()


def _outcome(answer: Answer) -> Outcome:
    if answer.outcome != "answered":
        return answer.outcome
    if answer.status == 503:
        return "503"
    return "absent" if answer.status == 404 else "error"
