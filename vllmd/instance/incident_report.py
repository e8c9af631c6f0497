"""What an incident's files hold: made from what was gathered, redacted, and cut at its size."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllmd import __version__
from vllmd.config import show
from vllmd.config.layers import Loaded
from vllmd.config.redact import redact_tree, redactor
from vllmd.core.events import Failure
from vllmd.core.faults import Cause, Facts
from vllmd.instance.board import Board
from vllmd.instance.causes import Occurrence
from vllmd.instance.evidence_sheet import Sheet
from vllmd.instance.incident_store import Part
from vllmd.instance.vitals import Vitals
from vllmd.system.host import boot_id
from vllmd.system.terminal import printable

METRICS_BYTES, LOG_BYTES, JSON_BYTES = 1 << 20, 1 << 20, 256 << 10


@dataclass(frozen=True, slots=True)
class Material:
    """`lines` are the engine's last ones, redacted when they came."""

    cause: Cause
    lines: Sequence[str]
    sheets: Sequence[Sheet]
    loaded: Loaded
    secrets: tuple[str, ...]
    """Of the configuration, the credentials and the environment, and the keys that were made."""
    gpus: Mapping[str, Any] | None
    metrics: str


def parts(material: Material) -> list[Part]:
    """What tells most comes first."""
    redact = redactor(material.secrets)
    sheets = [Part(each.name, _clean(each.text, redact), each.note) for each in material.sheets]
    return [
        Part("cause.txt", _clean(_cause(material.cause), redact)),
        _cut("engine.log", "\n".join(material.lines).encode(errors="replace"), LOG_BYTES),
        *sheets,
        _cut("config.json", _json(redact_tree(show.as_dict(material.loaded), redact)), JSON_BYTES),
        _cut("gpu.json", _clean(_json(material.gpus).decode(), redact), JSON_BYTES, "" if material.gpus else "no GPU watch has told anything"),
        _cut("metrics.txt", _clean(material.metrics[:METRICS_BYTES], redact), METRICS_BYTES, "" if material.metrics else "no metrics have been read"),
    ]


def _cut(name: str, content: bytes, limit_bytes: int, note: str = "") -> Part:
    """The newest of a log is its end."""
    if len(content) <= limit_bytes:
        return Part(name, content, note)
    kept = content[-limit_bytes:] if name.endswith(".log") else content[:limit_bytes]
    return Part(name, kept, f"cut at {limit_bytes} bytes")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1, default=str).encode(errors="replace")


def _clean(text: str, redact: Callable[[str], str]) -> bytes:
    """Line by line: one look of a regular expression holds the interpreter, and so the loop, for as long as it lasts."""
    return "\n".join(printable(redact(line)) for line in text.split("\n")).encode(errors="replace")


def _cause(cause: Cause) -> str:
    failure = cause.failure
    lines = [f"{failure.code}: {failure.what}", f"what to do: {failure.hint}", f"status: {failure.status}"]
    if cause.traceback is not None:
        lines += ["", f"traceback ({cause.traceback.text}):", *(f"  {file}: {function}" for file, function in cause.traceback.frames)]
    return "\n".join(lines) + "\n"


def told(final: Failure, facts: Facts, coming: Occurrence, board: Board, vitals: Vitals, began: float) -> dict[str, Any]:
    """The summary, but for the incident's name. `began`: when it was noticed, so that the look at it makes nothing older."""
    document = board.document
    noticed = facts.failure
    age_s = vitals.heartbeat_age_at(began)
    return {
        "at": coming.at,
        "code": final.code,
        "what": final.what,
        "hint": final.hint,
        "status": final.status,
        "noticed": {"code": noticed.code, "what": noticed.what, "hint": noticed.hint},
        "fingerprint": coming.fingerprint,
        "count": coming.count,
        "since": coming.since,
        "first": coming.first,
        "phase": facts.phase,
        "serving": facts.serving,
        "engine_exit": facts.exit,
        "oom_kills": facts.oom_kills,
        "launch_id": document["launch_id"],
        "boot_id": boot_id(),
        "age_s": round(board.age_s, 3),
        "model": document["model"],
        "engine": document["engine"],
        "versions": {"vllmd": __version__, "python": platform.python_version(), "kernel": platform.release()},
        "heartbeat_age_s": None if age_s is None else round(age_s, 3),
        "running": vitals.running,
        "waiting": vitals.waiting,
    }


def plain_summary(summary: Mapping[str, Any], secrets: tuple[str, ...]) -> dict[str, Any]:
    redact = redactor(secrets)

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return printable(redact(value)) if isinstance(value, str) else value

    return {name: plain(value) for name, value in summary.items()}


def gpu_total_gib(snapshot: Mapping[str, Any] | None) -> float:
    """Of the smallest GPU that the watch has shown; 0 where it has shown none."""
    gpus = (snapshot or {}).get("gpus") or []
    totals = [each.get("memory_total_mib") for each in gpus if isinstance(each, Mapping)]
    return min((total for total in totals if isinstance(total, int | float) and total > 0), default=0) / 1024
