"""Our own metrics, in Prometheus' text format, made when somebody asks: GET /metrics on control.sock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vllmd import __version__
from vllmd.core.lifecycle import State
from vllmd.instance.board import Board
from vllmd.system.host import private_memory_bytes


def exposition(board: Board, *, journal_dropped: int, lines_dropped: int) -> bytes:
    """prometheus_client is imported by the first question: an instance that nobody scrapes does not pay for it."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

    class Collector:
        def collect(self) -> Iterable[Metric]:
            yield from _state(board, GaugeMetricFamily)
            yield from _start(board, GaugeMetricFamily)
            dropped = CounterMetricFamily("vllmd_dropped", "Journal entries and engine lines not passed on", labels=["what"])
            dropped.add_metric(["journal"], journal_dropped)
            dropped.add_metric(["engine_lines"], lines_dropped)
            yield dropped
            memory = "Private memory of the supervisor"
            yield GaugeMetricFamily("vllmd_private_memory_bytes", memory, value=private_memory_bytes())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return bytes(generate_latest(registry))


def _state(board: Board, gauge: Any) -> Iterator[Any]:
    document = board.document
    engine = document["engine"] or {}
    info = gauge("vllmd_info", "Versions and names, in labels", labels=["instance", "version", "engine", "engine_version", "model"])
    model = (document["model"] or {}).get("id", "")
    info.add_metric([document["instance"], __version__, engine.get("name", ""), engine.get("version", ""), model], 1)
    yield info
    states = gauge("vllmd_state", "1 for the state that the instance is in", labels=["state"])
    for state in State:
        states.add_metric([str(state)], float(document["state"] == str(state)))
    yield states
    yield gauge("vllmd_ready", "1 when the engine answers", value=float(document["state"] == "ready"))
    yield gauge("vllmd_supervisor_age_seconds", "Since the supervisor's start", value=board.age_s)


def _start(board: Board, gauge: Any) -> Iterator[Any]:
    phases = gauge("vllmd_start_phase_seconds", "Time that each phase of this start took", labels=["phase"])
    for phase, seconds in board.phase_seconds.items():
        phases.add_metric([phase], seconds)
    yield phases
    progress = board.document["progress"]
    if progress["fraction"] is not None:
        yield gauge("vllmd_progress_ratio", "Progress of the present phase, 0 to 1", value=progress["fraction"])
    if progress["total_bytes"]:
        moved = gauge("vllmd_transfer_bytes", "Bytes of the model that the present phase (fetch, verify) has done, and has to do", labels=["phase", "what"])
        for what in ("done", "total"):
            moved.add_metric([board.document["phase"], what], progress[f"{what}_bytes"])
        yield moved
        yield gauge("vllmd_transfer_bytes_per_second", "Of that, over the last seconds", value=progress["bytes_per_s"])
