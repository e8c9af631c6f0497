"""What is known of an instance, as samples: (metric, labels, value). GPUs are in metric_gpus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import get_args

from vllmd import __version__
from vllmd.config.detectors import DETECTORS
from vllmd.config.settings import Watch
from vllmd.core.lifecycle import State
from vllmd.core.pulse import Outcome
from vllmd.engines.guard.vllmd_guard import REASONS
from vllmd.instance.board import Board
from vllmd.instance.vitals import Vitals
from vllmd.system.host import private_memory_bytes

Sample = tuple[str, Mapping[str, str], float]
RESULTS = ("acted", "observed", "paused")
CANARIES = ("ok", "late", "timeout", "failed", "refused", "void")
_NO_START = {"", "ready", "unconfigured"}


@dataclass(slots=True)
class Facts:
    """What the metrics are made from; `watch` and the counts of what was dropped are asked each time."""

    board: Board
    vitals: Vitals
    watch: Callable[[], Watch]
    journal_dropped: Callable[[], int]
    lines_dropped: Callable[[], int]
    failures: Mapping[str, int] = field(default_factory=dict)
    failed_at: Mapping[str, object] = field(default_factory=dict)
    """By cause, over all lives, as they were at the supervisor's start: its own failure is counted by the next one."""
    refusals: Callable[[], Mapping[str, int]] = dict
    keys: Callable[[], int] = int


def unix_time(value: object) -> float | None:
    """Of a number, or of text as `at` has it; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e12 else None
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else None
    except (ValueError, OverflowError, OSError):
        return None


def samples(facts: Facts) -> Iterator[Sample]:
    """Of everything but the GPUs."""
    yield from _instance(facts.board)
    yield from _start(facts.board)
    yield from _watch(facts.vitals, facts.watch())
    yield "vllmd_api_keys", {}, facts.keys()
    for reason, count in {**dict.fromkeys(REASONS, 0), **facts.refusals()}.items():
        yield "vllmd_requests_refused_total", {"reason": reason}, count
    yield from _failures(facts)
    yield "vllmd_dropped_total", {"what": "journal"}, facts.journal_dropped()
    yield "vllmd_dropped_total", {"what": "engine_lines"}, facts.lines_dropped()
    yield "vllmd_private_memory_bytes", {}, private_memory_bytes()


def one_of(metric: str, label: str, known: tuple[str, ...], now: str, **labels: str) -> Iterator[Sample]:
    """A 0 for each that it is not: who asks for a state that was never met finds a number, not nothing."""
    for each in known if now in known or not now else (*known, now):
        yield metric, {**labels, label: each}, float(each == now)


def _instance(board: Board) -> Iterator[Sample]:
    document = board.document
    engine, model = document["engine"] or {}, document["model"] or {}
    labels = {"engine": engine.get("name", ""), "engine_version": engine.get("version", ""), "model": model.get("id", "")}
    yield "vllmd_info", {"version": __version__, **labels}, 1
    yield from one_of("vllmd_state", "state", tuple(map(str, State)), document["state"])
    since = unix_time(document["since"])
    if since is not None:
        yield "vllmd_state_change_time_seconds", {}, since
    yield "vllmd_ready", {}, float(document["state"] == "ready")
    yield "vllmd_supervisor_start_time_seconds", {}, board.born_at
    yield "vllmd_settings_waiting_for_restart", {}, len(document["needs_restart"])


def _start(board: Board) -> Iterator[Sample]:
    phases, phase = dict(board.phase_seconds), board.document["phase"]
    if phase not in _NO_START:
        phases[phase] = time.monotonic() - board.phase_began
    for name, seconds in phases.items():
        if name not in _NO_START:
            yield "vllmd_start_phase_seconds", {"phase": name}, seconds
    if board.start_s is not None:
        yield "vllmd_start_duration_seconds", {}, board.start_s
    progress = board.document["progress"]
    if progress["fraction"] is not None:
        yield "vllmd_progress_ratio", {}, progress["fraction"]
    if progress["total_bytes"]:
        for name, key in (("done_bytes", "done_bytes"), ("size_bytes", "total_bytes"), ("speed_bytes_per_second", "bytes_per_s")):
            yield f"vllmd_transfer_{name}", {"phase": phase}, progress[key]


def _watch(vitals: Vitals, settings: Watch) -> Iterator[Sample]:
    if vitals.heartbeat_age_s is not None:
        yield "vllmd_engine_heartbeat_age_seconds", {}, vitals.heartbeat_age_s
    yield "vllmd_watch_hang_timeout_seconds", {}, settings.hang_timeout_s
    yield "vllmd_engine_requests_running", {}, vitals.running
    yield "vllmd_engine_requests_waiting", {}, vitals.waiting
    yield from one_of("vllmd_engine_scrape_outcome", "outcome", get_args(Outcome), vitals.last_scrape)
    for outcome in dict.fromkeys((*CANARIES, *vitals.canaries)):
        yield "vllmd_canaries_total", {"outcome": outcome}, vitals.canaries[outcome]
    if vitals.canary_s is not None:
        yield "vllmd_canary_duration_seconds", {}, vitals.canary_s
    # All of them from the start: increase() does not see a counter that begins with 1.
    for key in dict.fromkeys((*((detector, result) for detector in DETECTORS for result in RESULTS), *vitals.verdicts)):
        yield "vllmd_verdicts_total", {"detector": key[0], "result": key[1]}, vitals.verdicts[key]
    yield "vllmd_engine_process_deaths_total", {}, vitals.deaths
    yield "vllmd_paused", {}, float(vitals.paused is not None)


def _failures(facts: Facts) -> Iterator[Sample]:
    for cause, count in facts.failures.items():
        yield "vllmd_failures_total", {"cause": cause}, max(count, 0)
    for cause, text in facts.failed_at.items():
        at = unix_time(text)
        if at is not None:
            yield "vllmd_last_failure_time_seconds", {"cause": cause}, at
