"""The engine's output: each line to the journal with its level, to the start's clock, and the last ones kept for the record."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable

from vllmd.core.faults import is_calm
from vllmd.core.plan import Endpoint
from vllmd.engines.protocol import Engine, LogFact
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr, printable

KEPT_LINES = 200
SEARCHED_LINES, SEARCHED_CHARACTERS = 3000, 1000
"""A cause is looked for further up: eight workers write a hundred lines each about the one that failed first."""
SHOWN_BYTES = 400

_CAUSE = re.compile(r"\b([A-Z]\w*(?:Error|Exception|Interrupt)\b: .+|error: .+|SIG[A-Z]+\b.*)")
_NOT_THE_CAUSE = ("see root cause above", "engine core initialization failed", "enginedeaderror")
"""vLLM's last lines hide the cause: it stands further up, in the process that met it."""


class Output:
    """`on_fact` hears each line's phase and progress. `redact` removes secrets before anything is kept or shown."""

    def __init__(
        self, engine: Engine, journal: Journal | Stderr, redact: Callable[[str], str], on_fact: Callable[[LogFact], None]
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._redact = redact
        self._on_fact = on_fact
        self._phase = ""
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._recent: deque[tuple[float, str]] = deque(maxlen=SEARCHED_LINES)
        self.dropped = 0

    def line(self, text: str) -> None:
        if not text.strip():
            return
        text = self._redact(text)
        fact = self._engine.read_line(text)
        self._phase = fact.phase or self._phase
        shown = printable(text)
        self.lines.append(shown)  # they go into last.json, STATUS= and other people's terminals
        self._recent.append((time.monotonic(), shown[:SEARCHED_CHARACTERS]))
        self._journal.engine_line(text, fact.priority, phase=self._phase)
        self._on_fact(fact)

    def recent(self, seconds: float) -> tuple[str, ...]:
        """The beginnings of the lines of so many seconds, of the last ones where there are too many."""
        since = time.monotonic() - seconds
        return tuple(text for at, text in self._recent if at >= since)

    def lost(self, count: int) -> None:
        """Lines that were not passed on, since the last call."""
        self.dropped += count
        self._journal.event("lines-dropped", f"{count} lines of the engine were dropped: it logs too fast", priority=4)

    def cause(self) -> str:
        """The line that most likely names why the engine ended, or ''."""
        for line in reversed(self.lines):
            found = _CAUSE.search(line)
            if found and not is_calm(line) and not any(word in line.lower() for word in _NOT_THE_CAUSE):
                return found.group(1)[:SHOWN_BYTES]
        return ""


def example(endpoint: Endpoint, body: str, path: str, *, key: str) -> str:
    """A curl that can be pasted. `key`: shell words that give one ('' where none is wanted)."""
    key = f" -H \"Authorization: Bearer {key}\"" if key else ""
    target = f"http://{endpoint.reachable_host}:{endpoint.port}"
    if ":" in endpoint.reachable_host:
        target = f"http://[{endpoint.reachable_host}]:{endpoint.port}"
    if endpoint.kind == "uds":
        target = f"--unix-socket {endpoint.path} http://localhost"
    return f"curl {target}{path}{key} -H 'Content-Type: application/json' -d '{body}'"
