"""vLLM's /metrics as a heartbeat: the few figures of each rank, picked from a stream of any size, line by line.

prometheus_client is not asked: it would build an object for each of a thousand lines every second. Nothing of the text is
kept but those figures, and a line that is none of ours costs one failed match.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from vllmd.core.pulse import Outcome, Rank
from vllmd.engines.protocol import ProofRequest

LINE_MAX_BYTES = 64 << 10

_BEATS = "iteration_tokens_total_count"
_OTHERS = ("generation_tokens_total", "prompt_tokens_total", "kv_cache_usage_perc", "prefix_cache_queries_total", "num_preemptions_total")
_NAMES = (_BEATS, "num_requests_running", "num_requests_waiting", "request_success_total", "engine_sleep_state", *_OTHERS)
_LINE = re.compile(rb"^vllm:(%s)\{([^\n]*)\} +(\S+)[^\n]*$" % "|".join(_NAMES).encode(), re.MULTILINE)
_LABEL = re.compile(rb'(\w+)="((?:[^"\\]|\\.)*)"')
_ENDED_BADLY = {b"abort", b"error"}


class Reading:
    """`feed` what comes, then ask `result` once. Same rank, several API servers (or label sets): added up."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, str], float] = {}
        self._rest = b""
        self._skipping = False
        self._asleep = self._ours = self._exposition = False

    def feed(self, data: bytes) -> None:
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            if not newline:
                return
            self._skipping = False
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if len(self._rest) > LINE_MAX_BYTES:
            self._rest, self._skipping = b"", True
        self._lines(data[:end])

    def result(self) -> tuple[Outcome, Mapping[str, Rank]]:
        """`absent` for an exposition without any of vLLM's figures (--disable-log-stats); `invalid` for what is none."""
        self._lines(self._rest)
        ranks = {rank: self._rank(rank) for name, rank in self._figures if name == _BEATS}
        if self._asleep:
            return "sleeping", {}
        if ranks:
            return "ok", ranks
        return ("absent" if self._exposition and not self._ours else "invalid"), {}

    def _lines(self, text: bytes) -> None:
        self._exposition = self._exposition or b"# TYPE " in text
        for match in _LINE.finditer(text):
            self._take(match[1].decode(), dict(_LABEL.findall(match[2])), match[3])

    def _take(self, name: str, labels: Mapping[bytes, bytes], text: bytes) -> None:
        self._ours = True
        value = _number(text)
        if value is None:
            return
        if name == "engine_sleep_state":
            self._asleep |= labels.get(b"sleep_state") == b"awake" and value == 0
        elif name != "request_success_total" or labels.get(b"finished_reason") not in _ENDED_BADLY:
            key = name, labels.get(b"engine", b"").decode(errors="replace")
            self._figures[key] = self._figures.get(key, 0.0) + value

    def _rank(self, rank: str) -> Rank:
        figure: Callable[[str], float] = lambda name: self._figures.get((name, rank), 0.0)  # noqa: E731
        told: Callable[[str], float | None] = lambda name: self._figures.get((name, rank))  # noqa: E731
        return Rank(
            beats=figure(_BEATS),
            running=figure("num_requests_running"),
            waiting=figure("num_requests_waiting"),
            succeeded=figure("request_success_total"),
            others=tuple(map(figure, _OTHERS)),
            generated=told("generation_tokens_total"),
            prompted=told("prompt_tokens_total"),
            kv_used=told("kv_cache_usage_perc"),
        )


def _number(text: bytes) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def addressed(request: ProofRequest, rank: str) -> ProofRequest:
    """The request for one data-parallel rank; vLLM then asks no other."""
    return replace(request, headers={**request.headers, "X-data-parallel-rank": rank}) if rank.isdecimal() else request
