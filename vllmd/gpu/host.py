"""The host unit's service, `vllmd gpu-watch` (vllmd-gpu.service): watches every GPU, keeps the quarantine, answers on gpu.sock.

One loop; what can block is in the sampler, or in a thread. It acts on no engine: instances do that, each for its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.settings import GpuWatch, Metrics
from vllmd.core.gpu_findings import QUARANTINE, Finding
from vllmd.errors import VllmdError
from vllmd.gpu.feed import Feed
from vllmd.gpu.quarantine import Record
from vllmd.gpu.watch import Sources, Watch
from vllmd.system.files import read_small, storage_error, write_atomic
from vllmd.system.host import boot_id
from vllmd.system.journal import Journal
from vllmd.system.notify import NullNotifier
from vllmd.system.publishing import Publisher
from vllmd.system.terminal import Stderr
from vllmd.system.threads import in_thread

AGAIN_S = 60.0
"""The same error of the same GPU is journalled this often at most; all of them are counted."""
SETTLE_S = 2.0
_REMEMBERED = 1024
_POSITION = "gpu-kmsg.json"
TEXTFILE = "vllmd_gpu_watch.prom"
"""Of no instance's form: theirs are vllmd-NAME.prom."""
_TURN_S = 1.0


class Host:
    def __init__(
        self,
        paths: Paths,
        settings: GpuWatch,
        observe: Collection[str],
        *,
        notifier: NullNotifier,
        journal: Journal | Stderr,
        sources: Sources | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._paths = paths
        self._settings = settings
        self._observe = frozenset(observe)
        self._notifier = notifier
        self._journal = journal
        self._position = paths.runtime / _POSITION
        sources = replace(sources or Sources(), after=read_position(self._position))
        self._watch = Watch(paths, settings, told=self._told, seen=self._seen, sources=sources, keeps=True, observe=observe, changed=self._changed)
        self._feed = Feed(paths.gpu_socket, self._watch.document, self._metrics)
        # Its sandbox has no network: of what instances can do, the file alone.
        self._textfile = replace(metrics or Metrics(), listen="")
        self._publisher = Publisher(TEXTFILE, lambda: ("text/plain", self._metrics()), journal)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._journalled: dict[tuple[str, str, int], float] = {}
        self._source = ""
        self._shown_at = 0.0
        self._saved = sources.after
        self._status = ""

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. TryLater where another one answers on gpu.sock; PermissionMissing, StorageFailed."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        self._journal.attach(loop)
        await self._listen()
        watch = asyncio.create_task(self._watch.run())
        watch.add_done_callback(lambda _task: ended.set())
        turns = asyncio.create_task(self._turns())
        self._publisher.apply(self._textfile)
        try:
            self._notifier.ready(self._summary())
            self._journal.event("gpu-watching", f"watching GPUs, every {self._settings.interval_s:g} s" + self._observing())
            await ended.wait()
        finally:
            self._notifier.stopping("stopping")
            await self._settle(watch)
            for task in (turns, watch):
                task.cancel()
            ends = await asyncio.gather(turns, watch, return_exceptions=True)
            await self._publisher.close()
            await self._feed.close()
            if (position := self._position_to_save()) is not None:
                self._save_position(position)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    def _observing(self) -> str:
        names = ", ".join(sorted(name for name in self._observe if name.startswith("gpu_")))
        return f"; only observed: {names}" if names else ""

    async def _listen(self) -> None:
        try:
            self._paths.gpu_socket.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        except OSError as error:
            raise storage_error(error, f"make {self._paths.gpu_socket.parent}") from error
        try:
            await self._feed.start()
        except VllmdError as error:
            if error.code == "control_socket_in_use":
                error.hint = "Another gpu-watch runs on this host: `systemctl status vllmd-gpu`."
            raise

    # -- each second

    async def _turns(self) -> None:
        every_s = min(_TURN_S, self._settings.interval_s, self._notifier.watchdog_s / 3 or _TURN_S)
        unreadable = ""
        while True:
            self._notifier.watchdog()
            if self._watch.kmsg.refused != unreadable:
                unreadable = self._watch.kmsg.refused
                text = f"the kernel's log cannot be read ({unreadable}): Xids come from NVML's events alone, without their process"
                self._journal.event("gpu-log-unreadable", text, priority=4)
            if time.monotonic() - self._shown_at >= 2 * self._settings.interval_s:  # a hung driver gives no snapshot: the clients hear that we live
                self._show(self._watch.document())
            if (position := self._position_to_save()) is not None:
                await in_thread(lambda position=position: self._save_position(position))  # type: ignore[misc]
            await asyncio.sleep(every_s)

    def _position_to_save(self) -> int | None:
        """None where there is nothing new, or something of it waits for the driver or the disk: whoever is killed now has not told it."""
        position = self._watch.kmsg.position
        return position if position != self._saved and self._watch.is_settled else None

    async def _settle(self, watch: asyncio.Task[None]) -> None:
        """A quarantine that is being written is waited for: cut off now, the next service would take its line for new."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                while not self._watch.is_settled and not watch.done():
                    await asyncio.sleep(0.02)

    def _save_position(self, position: int) -> None:
        """So that the next service does not take for new what this one has told, and a person may have cleared."""
        self._saved = position
        with contextlib.suppress(OSError):
            write_atomic(self._position, json.dumps({"boot_id": boot_id(), "sequence": position}), fsync=False)

    # -- what the watch says

    def _told(self, finding: Finding) -> None:
        self._feed.tell(finding)
        self._counts[finding.detector, finding.cls] += 1
        key, now = (finding.uuid or finding.pci, finding.detector, finding.xid), time.monotonic()
        if now - self._journalled.get(key, -AGAIN_S) < AGAIN_S:
            return
        if len(self._journalled) >= _REMEMBERED:
            self._journalled.clear()
        self._journalled[key] = now
        self._write(finding)

    def _write(self, finding: Finding) -> None:
        would = finding.detector in self._observe and finding.cls in QUARANTINE
        event = "gpu-would-quarantine" if would else "gpu-stuck" if finding.detector == "gpu_stuck" else "gpu-finding"
        severe = finding.cls in QUARANTINE or finding.detector == "gpu_stuck"
        priority = 5 if finding.cls in ("app", "sympathetic") else 3 if severe and not would else 4
        where = " ".join(filter(None, (finding.uuid, f"at {finding.pci}" if finding.pci else "")))
        text = ": ".join(filter(None, (where, finding.what))) + (" (only observed: not quarantined)" if would else "")
        process = f"{finding.process} ({finding.pid})" if finding.pid else ""
        self._journal.event(
            event, text, priority=priority, gpu=finding.uuid, xid=finding.xid or "", detector=finding.detector, cls=finding.cls, process=process, hint=finding.hint
        )

    def _changed(self, event: str, text: str, record: Record) -> None:
        priority = 5 if event == "gpu-released" else 3
        self._journal.event(event, text, priority=priority, gpu=record.uuid, xid=record.xid or "", cls=record.cls, hint=record.hint if priority == 3 else "")

    def _seen(self, document: dict[str, Any]) -> None:
        source = document["source"]
        if source != self._source and not document["stuck_in"]:
            if self._source == "nvml":
                self._journal.event("gpu-driver-gone", f"the GPU driver is gone: {document.get('note', '')}", priority=4)
            elif self._source and source == "nvml":
                self._journal.event("gpu-driver-back", f"the GPU driver {document.get('driver_version', '')} is there, with {len(document['gpus'])} GPUs", priority=5)
            self._source = source
        self._show(document)

    def _show(self, document: dict[str, Any]) -> None:
        self._shown_at = time.monotonic()
        self._feed.show(document)
        status = self._summary()
        if status != self._status:
            self._status = status
            self._notifier.status(status)

    def _summary(self) -> str:
        document = self._watch.document()
        if document["stuck_in"]:
            return f"The GPU driver hangs in {document['stuck_in']}"
        bad = [gpu for gpu in document["gpus"] if gpu["verdict"]["class"] != "ok"]
        count = len(document["gpus"])
        named = ", ".join(f"{gpu['index']} {gpu['verdict']['class']}" for gpu in bad)
        return f"{count} GPU{'' if count == 1 else 's'}" + (f": {named}" if bad else "")

    def _metrics(self) -> bytes:
        lines = ["# HELP vllmd_gpu_watch_findings_total Findings about GPUs.", "# TYPE vllmd_gpu_watch_findings_total counter"]
        lines += [f'vllmd_gpu_watch_findings_total{{detector="{name}",class="{cls}"}} {count}' for (name, cls), count in sorted(self._counts.items())]
        for name, kind, text, value in (
            ("repeated_total", "counter", "Findings that were told already.", self._watch.repeated),
            ("kernel_records_total", "counter", "Records of the kernel's log that were looked at.", self._watch.kmsg.records),
            ("kernel_log_overruns_total", "counter", "Times that the kernel's log was overwritten before it was read.", self._watch.kmsg.lost),
            ("driver_stuck", "gauge", "Whether a call into the driver does not return.", int(bool(self._watch.stuck_in))),
            ("subscribers", "gauge", "Clients of /events.", self._feed.subscribers),
        ):
            lines += [f"# HELP vllmd_gpu_watch_{name} {text}", f"# TYPE vllmd_gpu_watch_{name} {kind}", f"vllmd_gpu_watch_{name} {value}"]
        lines += ["# HELP vllmd_gpu_watch_quarantined 1 for a GPU that no instance may start on, by what lifts it.", "# TYPE vllmd_gpu_watch_quarantined gauge"]
        lines += [f'vllmd_gpu_watch_quarantined{{gpu="{uuid}",class="{cls}"}} 1' for uuid, cls in sorted(self._watch.quarantined.items())]
        return ("\n".join(lines) + "\n").encode()


def read_position(path: Path) -> int:
    """The number of the last record of the kernel's log that was told; -1 in a new boot."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        words = json.loads(read_small(path, 4096))
        number = words.get("sequence") if isinstance(words, dict) and words.get("boot_id") == boot_id() else -1
        return number if type(number) is int else -1
    return -1
