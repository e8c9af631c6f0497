"""Expositions to test rules and queries against: ours with everything in it, and vLLM's as it was recorded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllmd.config.settings import Watch
from vllmd.instance.board import Board
from vllmd.instance.metric_samples import Facts
from vllmd.instance.metrics import exposition
from vllmd.instance.vitals import Vitals

VLLM = Path(__file__).with_name("data") / "vllm-0.32.0-metrics.txt"
"""GET /metrics of a real one on the CPU after one completion; `python -m tests.engine.record_metrics` makes it anew."""
UUID = "GPU-6f2c1b9e-0000-4000-8000-00000000a001"
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ", re.MULTILINE)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="')


def gpu(**changes: Any) -> dict[str, Any]:
    return {
        "index": 0,
        "uuid": UUID,
        "pci": "0000:19:00.0",
        "name": "NVIDIA H200",
        "memory_total_mib": 143771,
        "memory_used_mib": 120000,
        "temperature_c": 61,
        "utilization_pct": 97,
        "power_w": 512.5,
        "clock_reasons": ["software_thermal"],
        "ecc": {"corrected": 3, "uncorrected": 0},
        "remapped": {"correctable": 1, "uncorrectable": 0, "pending": False, "failed": False},
        "retired_pages": 0,
        "nvlink": {"crc_errors": 12},
        "pcie": {"gen": 5, "width": 16, "max_gen": 5, "max_width": 16},
        "lost": "",
        "mig": [],
        "verdict": {"class": "ok", "what": "", "hint": ""},
        "quarantine": None,
        **changes,
    }


def snapshot(*gpus: object, **changes: Any) -> dict[str, Any]:
    return {"schema": 1, "source": "nvml", "driver_version": "570.86.15", "at": "2026-01-02T03:04:05.678Z", "stuck_in": "", "gpus": list(gpus), **changes}


def facts(path: Path, gpus: dict[str, Any] | None = None) -> Facts:
    """An instance of which all is known that can be."""
    board = Board("demo", path / "status.json", lambda _text: None, vllmctl="vllmctl")
    board.phase_seconds = {"resolve": 0.2, "spawn": 1.5}
    board.start_s = 31.0
    board.document |= {"state": "ready", "phase": "fetch", "gpus": [UUID]}
    board.document["progress"] |= {"fraction": 0.5, "done_bytes": 5, "total_bytes": 10, "bytes_per_s": 2.0}
    vitals = Vitals(heartbeat_at=0.0, running=2, waiting=1, last_scrape="ok", canary_s=0.2)
    vitals.canaries = Counter({"ok": 2})
    vitals.gpus = snapshot(gpu()) if gpus is None else gpus
    found = Facts(board, vitals, Watch, journal_dropped=lambda: 0, lines_dropped=lambda: 3)
    found.failures, found.failed_at = {"engine_hung": 1}, {"engine_hung": "2026-01-02T03:04:05.678Z"}
    return found


def ours(path: Path) -> str:
    return exposition(facts(path)).decode()


def names(text: str) -> dict[str, set[str]]:
    """The labels of each metric."""
    found: dict[str, set[str]] = {}
    for name, labels in _samples(text):
        found.setdefault(name, set()).update(_LABEL.findall(labels))
    return found


def _samples(text: str) -> Iterator[tuple[str, str]]:
    yield from _SAMPLE.findall("\n".join(line for line in text.splitlines() if not line.startswith("#")) + "\n")
