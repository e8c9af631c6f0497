"""What everybody may know of an instance: one document, shown as status.json, by GET /status and as STATUS=."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllmd.config.redact import redact_tree
from vllmd.core.events import Failure
from vllmd.core.load import Load
from vllmd.core.plan import Plan
from vllmd.models.progress import Progress
from vllmd.system.files import write_atomic

SCHEMA = 1
NO_PROGRESS: Mapping[str, Any] = {"fraction": None, "text": "", "done_bytes": 0, "total_bytes": 0, "bytes_per_s": 0, "eta_s": None}
"""Bytes while some are on their way; `eta_s` None where nobody can say."""
FLUSH_S = 0.1
"""A start can log hundreds of percentages a second; nobody reads them faster than this."""


def now_text() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe_failure(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {"code": failure.code, "what": failure.what, "hint": failure.hint, "status": failure.status}


class Board:
    """`path` is status.json; `tell` gets the STATUS= line whenever it changes. Written at once when the state changes,
    soon when only progress does. A write that fails is dropped: the file is for readers, the daemon goes on."""

    def __init__(self, instance: str, path: Path, tell: Callable[[str], object], *, vllmctl: str, redact: Callable[[str], str] = str) -> None:
        self.path = path
        self._vllmctl = vllmctl
        self._tell = tell
        self._redact = redact
        self._told = ""
        self._flush: asyncio.TimerHandle | None = None
        self.phase_began = self._born = time.monotonic()
        self.born_at = time.time()
        self.phase_seconds: dict[str, float] = {}
        self.start_s: float | None = None
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "instance": instance,
            "state": "created",
            "since": now_text(),
            "phase": "",
            "progress": dict(NO_PROGRESS),
            "engine": None,
            "launch_id": "",
            "model": None,
            "endpoint": "",
            "endpoints": [],
            "error": None,
            "warnings": [],
            "needs_restart": [],
            "paused": None,
            "gpus": [],
            "load": None,
            "last_event": None,
            "example": "",
            "group": None,
            "role": None,
            "rank": None,
        }

    def plan(self, plan: Plan) -> None:
        installed = plan.installed
        self.document["engine"] = {
            "name": plan.engine,
            "version": installed.version,
            "executable": installed.executable,
            "chosen": installed.chosen,
            "pid": None,
        }
        self.document["endpoints"] = [str(endpoint) for endpoint in plan.endpoints]
        self.document["endpoint"] = self.document["endpoints"][0]
        self.document["model"] = {"id": plan.model.identity, "directory": "", "via": "", "served_name": plan.served_name}
        self.document["warnings"] = list(plan.warnings)
        self.soon()

    def state(self, state: str, failure: Failure | None) -> None:
        if state != self.document["state"]:
            self.document |= {"state": state, "since": now_text(), "progress": dict(NO_PROGRESS), "load": None}
        self.document["error"] = describe_failure(failure)
        self.now()

    def phase(self, phase: str) -> None:
        """A new phase of the start; the time of the one before is kept for the metrics."""
        if phase == self.document["phase"]:
            return
        if self.document["phase"]:
            self.phase_seconds[self.document["phase"]] = time.monotonic() - self.phase_began
        self.phase_began = time.monotonic()
        if phase == "ready":
            self.start_s = self.age_s
        self.document |= {"phase": phase, "progress": dict(NO_PROGRESS)}
        self.soon()

    def progress(self, fraction: float | None, text: str = "") -> None:
        self.document["progress"] = {**NO_PROGRESS, "fraction": fraction, "text": text}
        self.soon()

    def transfer(self, phase: str, moved: Progress, text: str) -> None:
        """Bytes on their way: of a download, of a verification."""
        self.phase(phase)
        counts = {"done_bytes": moved.done_bytes, "total_bytes": moved.total_bytes, "bytes_per_s": moved.bytes_per_s}
        eta_s = moved.eta_s if moved.eta_s >= 0 else None
        self.document["progress"] = {"fraction": moved.fraction, "text": text, **counts, "eta_s": eta_s}
        self.soon()

    def load(self, load: Load | None) -> None:
        """What the engine works at; None where it does not say. An engine without work changes nothing, and costs nothing."""
        said = None if load is None or self.document["state"] != "ready" else asdict(load)
        if said != self.document["load"]:
            self.set(load=said)

    def told(self, event: str, text: str, priority: int) -> None:
        """One of our own events, for those who may not read the journal."""
        with contextlib.suppress(RuntimeError):  # told by a thread: the next change shows it
            self.set(last_event={"at": now_text(), "event": event, "text": text, "priority": priority})

    def set(self, **fields: Any) -> None:
        self.document |= fields
        self.soon()

    def soon(self) -> None:
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(FLUSH_S, self.now)

    def now(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        text = self._redact(self.sentence())
        if text != self._told:
            self._told = text
            self._tell(text)
        try:
            write_atomic(self.path, json.dumps(self.shown(), ensure_ascii=False) + "\n", fsync=False)
        except OSError:
            return

    def shown(self) -> dict[str, Any]:
        """The document as anybody may read it: what failed may have quoted a secret."""
        shown = redact_tree(self.document, self._redact)
        assert isinstance(shown, dict)
        return shown

    def close(self) -> None:
        self.now()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._born

    def sentence(self) -> str:
        """STATUS=: one line that a person reads in `systemctl status`."""
        paused = self.document["paused"]
        return (f"Paused until {paused['until']} by {paused['by']}, nothing is judged. " if paused else "") + self._sentence()

    def _sentence(self) -> str:
        document = self.document
        error = document["error"]
        if error and document["state"] in {"examining", "killing", "stopped"}:
            return f"Failed: {error['what']}" + (f" ({error['hint']})" if error["hint"] else "")
        served = (document["model"] or {}).get("served_name", "")
        match document["state"]:
            case "ready":
                return f"Serving {served} at {document['endpoint']}"
            case "unconfigured":
                return f"No model selected. Run: {self._vllmctl} model set {document['instance']} PRESET|MODEL ({self._vllmctl} model presets shows what fits)"
            case "starting" | "proven":
                return f"Starting: {document['phase'] or 'engine'}{self._progress_text()}"
            case "checking":
                return "Checking the host"
            case "resolving":
                doing = "Downloading" if document["phase"] == "fetch" else "Resolving"
                return f"{doing} the model{self._progress_text()}"
            case "draining":
                return "Stopping: requests in flight may finish"
            case "killing":
                return "Stopping: ending every process"
            case state:
                return str(state).capitalize()

    def _progress_text(self) -> str:
        progress = self.document["progress"]
        fraction = progress["fraction"]
        percent = "" if fraction is None else f" {fraction:.0%}"
        return percent + (f", {progress['text']}" if progress["text"] else "")
