"""The clocks of one start (core/progress), wound by what the engine shows: its lines, its CPU time, verified bytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from vllmd.core.events import Failure
from vllmd.core.plan import Deadlines
from vllmd.core.progress import StartClock
from vllmd.engines.protocol import LogFact
from vllmd.errors import Status
from vllmd.instance.clockwork import Clockwork

LOOK_S = 1.0
BUSY_FRACTION = 0.2
"""Less CPU than this share of a core is an engine that only polls: no progress at all."""
TOLD_STEP_S = 1.0
"""systemd is told again when the deadline has moved by this much."""


class StartWatch:
    """`cpu_s` is the CPU time of the engine's family so far, in seconds."""

    def __init__(self, deadlines: Deadlines, clockwork: Clockwork, cpu_s: Callable[[], float]) -> None:
        self._deadlines = deadlines
        self._clockwork = clockwork
        self._cpu_s = cpu_s
        self._told = 0.0
        self.begin()

    def begin(self) -> None:
        """The engine was spawned. Not before: the model may have been an hour on its way."""
        self.clock = StartClock.begin(time.monotonic(), stall_s=self._deadlines.stall_s, start_s=self._deadlines.start_s)

    def fact(self, fact: LogFact) -> None:
        self._take(self.clock.line(time.monotonic(), fact.phase, fact.fraction))

    def strong(self) -> None:
        self._take(self.clock.strong(time.monotonic()))

    def _take(self, clock: StartClock) -> None:
        self.clock = clock
        # Against what was told, not against the step before: a bar that grows every tenth of a second moves it too.
        if clock.deadline - self._told > TOLD_STEP_S:
            self._allow()

    def _allow(self) -> None:
        self._told = self.clock.deadline
        self._clockwork.allow(self.clock.deadline - time.monotonic() + self._deadlines.kill_s)

    async def expire(self, phase: Callable[[], str]) -> Failure:
        """Returns when the start has failed for want of progress or of time."""
        self._allow()
        cpu = self._cpu_s()
        while True:
            now = time.monotonic()
            verdict = self.clock.verdict(now)
            if verdict:
                return self._failure(verdict, phase())
            pause = min(LOOK_S, max(self.clock.deadline - now, 0.01))
            await asyncio.sleep(pause)
            used, cpu = self._cpu_s() - cpu, self._cpu_s()
            if used > BUSY_FRACTION * pause:
                self._take(self.clock.weak(time.monotonic()))

    def _failure(self, verdict: str, phase: str) -> Failure:
        where = f" (in phase {phase})" if phase else ""
        if verdict == "expired":
            minutes = self._deadlines.start_s / 60
            what = f"the engine did not come up within {minutes:g} minutes{where}"
            return Failure("start_timeout", what, "its lines in the journal say what took long; start.start_timeout_s", Status.TEMPFAIL)
        quiet = time.monotonic() - self.clock.strong_at
        what = f"the start makes no progress: nothing new for {quiet:.0f} s{where}"
        return Failure("start_stalled", what, "its last lines in the journal say where; start.stall_timeout_s", Status.TEMPFAIL)
