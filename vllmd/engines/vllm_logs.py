"""What one line of vLLM's output says: its level, a new phase of the start, a percentage.

Three formats come mixed: vLLM's own `(EngineCore pid=7) INFO 11-21 01:46:21 [core.py:133] text`, uvicorn's `INFO:     text`,
and lines of tqdm, Triton, Python warnings and C++ that have no level at all. Only tables here, and no state.
"""

from __future__ import annotations

import re

from vllmd.engines.protocol import LogFact

PHASES = (
    "importing",
    "configuring",
    "starting-engine",
    "loading-weights",
    "compiling",
    "allocating-kv-cache",
    "capturing-graphs",
    "starting-server",
)
"""In the order of a start; compiling and capturing only where they are not switched off."""

_PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2, "FATAL": 2}
_DEFAULT_PRIORITY = 6

_LEVEL = re.compile(
    r"(?:\([^)]{1,80}\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d |(DEBUG|INFO|WARNING|ERROR|CRITICAL): "
)
_FOREIGN_LEVEL = re.compile(
    r"(?:Traceback \(most recent call last\)|[\w.]+(?:Error|Exception|Interrupt): )|.*?(?:Warning: )"
)
_PERCENT = re.compile(r"\b(\d{1,3})%")

_MARKS: tuple[tuple[str, str], ...] = (
    ("non-default args: ", "configuring"),
    ("Initializing a V1 LLM engine", "starting-engine"),
    ("Initializing an LLM engine", "starting-engine"),
    ("Starting to load model", "loading-weights"),
    ("Loading safetensors checkpoint shards:", "loading-weights"),
    ("Loading pt checkpoint shards:", "loading-weights"),
    ("Multi-thread loading shards:", "loading-weights"),
    ("Loading weights took", "loading-weights"),
    ("Model loading took", "loading-weights"),
    ("Available KV cache memory", "allocating-kv-cache"),
    ("for KV cache on node", "allocating-kv-cache"),
    ("KV cache size:", "allocating-kv-cache"),
    ("Start compiling", "compiling"),
    ("Compiling a graph for", "compiling"),
    ("Dynamo bytecode transform time", "compiling"),
    ("Warming up model for the compilation", "compiling"),
    ("Capturing CUDA graph", "capturing-graphs"),
    ("Capturing cudagraphs", "capturing-graphs"),
    ("Capturing the model for cudagraphs", "capturing-graphs"),
    ("Starting vLLM server on", "starting-server"),
    ("Starting vLLM API server", "starting-server"),
    ("Application startup complete", "starting-server"),
)
"""Text in a line -> the phase that begins (or goes on) with it."""

_LINE_LIMIT = 2000


def read_line(line: str) -> LogFact:
    """Never raises. tqdm writes a bar over itself with carriage returns: the last state counts."""
    text = line.rstrip("\r\n").rpartition("\r")[2][:_LINE_LIMIT]
    phase = next((phase for mark, phase in _MARKS if mark in text), "")
    return LogFact(_priority(text), phase, _fraction(text) if phase and "%" in text else None)


def _priority(text: str) -> int:
    match = _LEVEL.match(text)
    if match:
        return _PRIORITY[match.group(1) or match.group(2)]
    foreign = _FOREIGN_LEVEL.match(text)
    if foreign is None:
        return _DEFAULT_PRIORITY
    return 4 if foreign.group().endswith("Warning: ") else 3


def _fraction(text: str) -> float | None:
    match = _PERCENT.search(text)
    return min(int(match.group(1)), 100) / 100 if match else None
