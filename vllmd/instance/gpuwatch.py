"""The watch over the instance's GPUs: what the host service (or a sampler child of ours) finds, and what it means for this engine.

What is another GPU's or another process's is nothing to us. A GPU that needs a reset, a reboot or a person is put into the
quarantine here too, since the host service may not run; the engine ends with 69, and no start follows until it is lifted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from vllmd.config.paths import Paths
from vllmd.config.settings import Watch
from vllmd.core.gpu_findings import Finding, judge_for_instance
from vllmd.errors import EngineFailed, GpuUnavailable, VllmdError
from vllmd.gpu import quarantine
from vllmd.gpu.client import Client
from vllmd.gpu.quarantine import Record
from vllmd.instance.gpus import Gpus
from vllmd.instance.judging import Judge
from vllmd.instance.vitals import Vitals
from vllmd.system.family import Family
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr
from vllmd.system.threads import in_thread

PIDS_INTERVAL_S = 5.0
"""An engine process that an Xid has ended is gone before the kernel's line is read: those of the last look count as ours."""
_PIDS_KEPT = 4096


class GpuWatch:
    """From the spawn to the end of the engine. `settings` is asked at each finding, so that a reload applies."""

    def __init__(
        self, paths: Paths, gpus: Gpus, family: Family, *, judge: Judge, vitals: Vitals, journal: Journal | Stderr, settings: Callable[[], Watch], client: Client
    ) -> None:
        self._paths = paths
        self._gpus = gpus
        self._family = family
        self._judge = judge
        self._vitals = vitals
        self._journal = journal
        self._settings = settings
        self._client = client
        self._pids: set[int] = set()

    async def run(self) -> None:
        """Until it is cancelled. Without a GPU it returns at once."""
        if not self._gpus.uuids:
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._remember())
                group.create_task(self._listen())
        finally:
            await self._client.close()

    async def _remember(self) -> None:
        while True:
            await self._look_at_pids()
            await asyncio.sleep(PIDS_INTERVAL_S)

    async def _look_at_pids(self) -> None:
        found = set(await in_thread(self._family.pids))
        self._pids = found if len(self._pids) > _PIDS_KEPT else self._pids | found

    async def _listen(self) -> None:
        async for said in self._client.stream():
            if isinstance(said, Finding):
                await self._found(said)
            else:
                self._vitals.gpus = said

    async def _found(self, finding: Finding) -> None:
        if finding.pid and finding.pid not in self._pids:
            await self._look_at_pids()
        uuids = self._gpus.uuids
        match judge_for_instance(finding, uuids, finding.pid in self._pids, len(uuids)):
            case "ignore":
                return
            case "journal":
                self._journal.event("gpu-trouble", f"{_named(finding)}: {finding.what}", priority=4, hint=finding.hint, **_fields(finding))
            case "restart":
                error: VllmdError = EngineFailed("gpu_xid", f"{_named(finding)}: {finding.what}", finding.hint)
                self._judge.reach(finding.detector, error, event="gpu-verdict")
            case "quarantine":
                await self._quarantine(finding)

    async def _quarantine(self, finding: Finding) -> None:
        """A detector that only observes writes no record either."""
        acts = finding.detector not in self._settings().observe and not self._vitals.paused
        kept = await self._record(finding) if acts else ""
        code = "gpu_lost" if finding.detector == "gpu_lost" else "gpu_quarantined"
        self._judge.reach(finding.detector, GpuUnavailable(code, f"{_named(finding)}: {finding.what}{kept}", finding.hint), event="gpu-verdict")

    async def _record(self, finding: Finding) -> str:
        """In a thread: the disk may be as sick as the GPU. Returns what the verdict should add."""
        cls = finding.cls
        assert cls in ("reset", "reboot", "replace")
        record = Record(finding.uuid, cls, finding.xid, finding.what, finding.hint, last_at=finding.at or time.time())
        try:
            async with asyncio.timeout(RECORD_TIMEOUT_S):
                await in_thread(lambda: _add(self._paths, record))
        except (OSError, ValueError, TimeoutError) as error:
            return f" (and the quarantine could not be written: {error or 'the disk does not answer'})"
        return ""


RECORD_TIMEOUT_S = 2.0
SAME_S = 2.0


def _add(paths: Paths, record: Record) -> None:
    known = quarantine.read(paths).get(record.uuid)
    if known is None or abs(record.last_at - known.last_at) > SAME_S or quarantine.is_graver(record, known):  # else by the host service, a moment ago
        quarantine.add(paths, record)


def _named(finding: Finding) -> str:
    return finding.uuid[:12] + (f" at {finding.pci}" if finding.pci else "") if finding.uuid else "the GPUs"


def _fields(finding: Finding) -> dict[str, object]:
    return {"detector": finding.detector, "xid": finding.xid or "", "gpu": finding.uuid}
