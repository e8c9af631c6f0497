"""The watch over all GPUs of the host: sampler, kernel log and book, put together. In the host unit, and in an instance without it.

    sampler ─ snapshots, NVML's Xids ─┐
                                      ├─ Book ─ findings ─ told(finding), and the quarantine
    kernel log ─ Xids, fallen off ────┘

Nothing here blocks: the driver is asked by the sampler, files are written by a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.settings import GpuWatch
from vllmd.core.gpu_book import Book
from vllmd.core.gpu_conditions import number, text
from vllmd.core.gpu_findings import QUARANTINE, Finding, of_xid
from vllmd.gpu import kmsg, quarantine
from vllmd.gpu.early import Early
from vllmd.gpu.kmsg import Kmsg, Line
from vllmd.gpu.quarantine import Record
from vllmd.gpu.sampling import Options, Sampling
from vllmd.system.host import boot_id
from vllmd.system.threads import in_thread

OLD_S = 60.0
"""A line of the kernel's log that is older says nothing about what runs now; only what needs a reset or more still counts."""
AGAIN_S = 10.0
RETRY_S = 10.0
_LOOK_S = 1.0
STUCK_HINT = "`journalctl -k -g NVRM` may say why; a wedged driver mostly needs a reboot. Engines go on as long as their own heartbeat does."


@dataclass(frozen=True, slots=True)
class Sources:
    """`kmsg`: the kernel's log ('' for none), of which what was written before `since`, and up to the record `after`, is known.
    `drm`: AMD's cards."""

    kmsg: str = str(kmsg.KMSG)
    since: float = 0.0
    after: int = -1
    drm: str = ""


class Watch:
    """`told` gets each finding, `seen` each new document. `keeps`: whether the quarantine is ours to write. `changed` gets a
    sentence about a GPU that was put in or let out."""

    def __init__(
        self,
        paths: Paths,
        settings: GpuWatch,
        *,
        told: Callable[[Finding], None],
        seen: Callable[[dict[str, Any]], None],
        sources: Sources,
        keeps: bool = False,
        observe: Collection[str] = (),
        changed: Callable[[str, str, Record], None] = lambda _event, _text, _record: None,
    ) -> None:
        self._paths = paths
        self._settings = settings
        self._told = told
        self._seen = seen
        self._keeps = keeps
        self._observe = observe
        self._changed = changed
        self._book = Book(settings)
        self._uuids: dict[str, str] = {}
        self._raw: dict[str, Any] = {"schema": 1, "boot_id": boot_id(), "source": "none", "driver_version": "", "at": time.time(), "gpus": []}
        self._quarantine: dict[str, Record] = {}
        self._wanted = asyncio.Event()
        self._waiting: dict[tuple[str, int], Record] = {}
        self._failed: set[tuple[str, int]] = set()
        self._early = Early()
        self._has_looked = False
        self._recorded: dict[tuple[str, int], float] = {}
        self._looked_at = 0.0
        self.stuck_in = ""
        self.kmsg = Kmsg(self._line, Path(sources.kmsg), sources.since, sources.after)
        self._reads_kmsg = bool(sources.kmsg)
        self.sampling = Sampling(Options(settings.interval_s, settings.call_timeout_s, sources.drm), self._said, self._stuck)

    @property
    def repeated(self) -> int:
        return self._book.repeated

    @property
    def quarantined(self) -> dict[str, str]:
        """What lifts it, by UUID: also of GPUs that nobody sees any more."""
        return {uuid: record.cls for uuid, record in self._quarantine.items()}

    @property
    def is_settled(self) -> bool:
        """Whether all that was noticed has been told, and is on the disk."""
        return not self._early and not self._waiting

    async def run(self) -> None:
        """Until it is cancelled."""
        if self._reads_kmsg:
            self.kmsg.start(asyncio.get_running_loop())
        self._wanted.set()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.sampling.run())
                group.create_task(self._keep())
        finally:
            self.kmsg.close()

    def document(self) -> dict[str, Any]:
        """As it is known now, with verdicts and quarantine (docs/gpu.md)."""
        at = time.monotonic()
        gpus = [self._judged(gpu, at) for gpu in self._raw["gpus"]]
        return {**self._raw, "stuck_in": self.stuck_in, "kernel_log": self.kmsg.refused, "gpus": gpus}

    def _judged(self, gpu: Mapping[str, Any], at: float) -> dict[str, Any]:
        record = self._quarantine.get(text(gpu, "uuid"))
        verdict = self._book.verdict(gpu, (record.cls, record.what, record.hint) if record else None, at)
        return {**gpu, "verdict": verdict, "quarantine": record.as_dict() if record else None}

    # -- the sampler

    def _said(self, words: Mapping[str, Any]) -> None:
        if isinstance(found := words.get("xid"), dict):
            xid = number(found, "xid") or 0
            finding = of_xid(int(xid), uuid=text(found, "uuid"), pci=text(found, "pci"), at=number(found, "at") or time.time())
            self._xid(finding, time.monotonic())
        elif isinstance(found := words.get("snapshot"), dict) and isinstance(found.get("gpus"), list):
            self._snapshot(found)

    def _snapshot(self, document: dict[str, Any]) -> None:
        self.stuck_in = ""
        gpus = [gpu for gpu in document["gpus"] if isinstance(gpu, dict)]
        self._raw = {**document, "gpus": gpus}
        self._uuids |= {text(gpu, "pci"): text(gpu, "uuid") for gpu in gpus if text(gpu, "pci") and text(gpu, "uuid")}
        for finding in self._book.snapshot(gpus, time.monotonic(), time.time()):
            self._tell(finding)
        self._tell_early()
        self._wanted.set()
        self._seen(self.document())

    def _stuck(self, stage: str) -> None:
        """Told once, until the driver answers again."""
        if not self.stuck_in:
            what = f"the GPU driver does not return from a call: {stage}, for {self._settings.call_timeout_s:g} s"
            finding = Finding("", "", "gpu_stuck", 0, "human", what=what, hint=STUCK_HINT, at=time.time())
            self.stuck_in = stage
            self._tell(finding)
        self.stuck_in = stage
        self._tell_early()
        self._seen(self.document())

    def _tell_early(self) -> None:
        self._has_looked = True
        for each in self._early.take():
            self._line(*each)

    # -- the kernel's log

    def _line(self, line: Line, written: float) -> None:
        if line.uuid:
            self._uuids[line.pci] = line.uuid
            return
        if not self._has_looked and line.pci not in self._uuids:  # which GPU it is, the first snapshot says
            self._early.put(line, written)
            return
        at = time.monotonic()
        uuid = self._uuids.get(line.pci, "")
        if self._book.is_told(uuid or line.pci, line.xid, line.pid, at):
            return
        age_s = max(0.0, kmsg.now() - written)
        finding = line.finding(uuid, time.time() - age_s)
        if age_s > OLD_S and finding.cls not in QUARANTINE:
            return
        self._xid(finding, at)
        if line.action:
            for each in self._book.recovery({"uuid": uuid, "pci": line.pci, "recovery_action": line.action}, at, finding.at):
                self._tell(each, line.action)

    # -- what comes of it

    def _xid(self, finding: Finding, at: float) -> None:
        for each in self._book.xid(finding, at):
            self._tell(each)
        if at - self._looked_at >= _LOOK_S:  # what the driver itself says of it (field 230), without waiting for the next turn
            self._looked_at = at
            self.sampling.look()

    def _tell(self, finding: Finding, action: int = 0) -> None:
        self._told(finding)
        if self._keeps and finding.uuid and finding.detector not in self._observe and finding.cls in ("reset", "reboot", "replace"):
            key, now = (finding.uuid, finding.xid), time.monotonic()
            if now - self._recorded.get(key, -AGAIN_S) < AGAIN_S:  # of a storm, one in a while is written
                return
            self._recorded[key] = now
            action = action or next((int(number(gpu, "recovery_action") or 0) for gpu in self._raw["gpus"] if gpu.get("uuid") == finding.uuid), 0)
            self._later(Record(finding.uuid, finding.cls, finding.xid, finding.what, finding.hint, driver=action, first_at=finding.at, last_at=finding.at))

    # -- the quarantine, in a thread: a disk may hang too

    def _later(self, record: Record) -> None:
        """One for each error of each GPU: a disk that hangs for an hour must not make us forget what came at its end."""
        key = (record.uuid, record.xid)
        old = self._waiting.get(key)
        self._waiting[key] = record if old is None else replace(record, first_at=old.first_at)
        self._wanted.set()

    async def _keep(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            for key, record in list(self._waiting.items()):
                await self._write(key, record)
            if self._waiting:
                asyncio.get_running_loop().call_later(RETRY_S, self._wanted.set)
            await self._read()

    async def _write(self, key: tuple[str, int], record: Record) -> None:
        """What cannot be written stays waiting: an Xid 79 comes once, and the disk may be full just then."""
        try:
            kept = await in_thread(lambda: quarantine.add(self._paths, record))
        except OSError as error:
            if key not in self._failed:
                self._failed.add(key)
                self._changed("gpu-quarantine-failed", f"the quarantine of {record.uuid} could not be written, and will be tried again: {error}", record)
            return
        except ValueError as error:  # it has no name for a file: nothing will help
            self._changed("gpu-quarantine-failed", f"the quarantine of {record.uuid} could not be written: {error}", record)
        else:
            self._changed("gpu-quarantined", f"{kept.uuid} is quarantined ({kept.cls}): {kept.what}", kept)
        self._failed.discard(key)
        if self._waiting.get(key) is record:
            del self._waiting[key]

    async def _read(self) -> None:
        known = await in_thread(lambda: quarantine.read(self._paths))
        for uuid in set(self._quarantine) - set(known):  # a person has cleared it
            self._book.forget(uuid)
            self._recorded = {key: at for key, at in self._recorded.items() if key[0] != uuid}
        self._quarantine = known
        for uuid, record in known.items() if self._keeps else ():
            if self._is_reset(uuid, record):
                with contextlib.suppress(OSError, ValueError):
                    await in_thread(lambda uuid=uuid: quarantine.clear(self._paths, uuid))  # type: ignore[misc]
                    self._quarantine = {each: kept for each, kept in self._quarantine.items() if each != uuid}
                    self._changed("gpu-released", f"{uuid} was reset: the driver asks for nothing any more, it may be used again", record)

    def _is_reset(self, uuid: str, record: Record) -> bool:
        """Only where the driver itself had asked for the reset, and has not any more for a while: of an Xid nobody can tell."""
        gpu = next((gpu for gpu in self._raw["gpus"] if gpu.get("uuid") == uuid), None)
        asked = record.cls == "reset" and (record.driver or not record.xid)
        later = number(self._raw, "at") or 0.0
        return bool(asked and gpu and not gpu.get("lost") and not gpu.get("recovery_action") and later - record.last_at > 2 * self._settings.interval_s)
