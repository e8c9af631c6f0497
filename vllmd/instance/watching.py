"""The watch over a ready engine: its heartbeat, its /health, the ends of its processes, and a proof of life when it is idle.

Whether it hangs is core/liveness' to decide, whether it refuses core/health's, and what a verdict comes to instance/judging's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from vllmd.config.settings import Watch as Settings
from vllmd.core.health import Refusals
from vllmd.core.liveness import ALONE, Finding, Limits, Liveness
from vllmd.core.load import Load, load_of
from vllmd.core.pulse import BUSY_CORES, Canary, Sample
from vllmd.engines.protocol import Beating
from vllmd.errors import EngineFailed, TryLater, VllmdError
from vllmd.instance import canary as canaries
from vllmd.instance.deaths import Dead, Deaths
from vllmd.instance.engine_life import EngineLife
from vllmd.instance.heartbeat import Heartbeat
from vllmd.instance.judging import Judge
from vllmd.instance.unreadable import Unreadable
from vllmd.instance.vitals import Vitals
from vllmd.system.host import boottime
from vllmd.system.http import request
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr

REFUSED_INTERVAL_S = 1.0
"""After a refusal look again soon: a dead engine says 503 within 0.3 s, and each turn would cost a whole interval."""
DEATH_LOOK_S = 0.05
DEATH_LOOKS_FOR_S = 2.0
DEATH_REFUSALS = 2
NAMED_MAX = 4


def limits_of(settings: Settings) -> Limits:
    return Limits(
        hang_s=settings.hang_timeout_s,
        first_s=settings.first_request_timeout_s,
        silent_s=settings.silent_timeout_s,
        canary_interval_s=settings.canary_interval_s,
        failures=settings.failures,
    )


class Watch:
    """One ready engine. `settings` is asked at each turn, so that a reload applies; `wake` lets it apply at once. `show`
    gets what the engine works at, for people."""

    def __init__(
        self,
        life: EngineLife,
        judge: Judge,
        vitals: Vitals,
        journal: Journal | Stderr,
        settings: Callable[[], Settings],
        *,
        show: Callable[[Load | None], None] = lambda _load: None,
    ) -> None:
        self._life = life
        self._judge = judge
        self._vitals = vitals
        self._journal = journal
        self._settings = settings
        self._show = show
        self._seen: Sample | None = None
        """The last reading, if it was a good one."""
        self._probe = life.probe
        self._heartbeat = Heartbeat(life.engine, life.probe, life.family)
        self._proofs = life.proofs()
        self._liveness = Liveness(limits_of(settings()), time.monotonic(), boottime())
        self._unreadable = Unreadable(journal, beating=isinstance(life.engine, Beating))
        self._wake = asyncio.Event()
        self._wake_health = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._dead: list[Dead] = []
        self._looker: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until it is cancelled; verdicts go to the judge, and whether one ends the instance is not known here."""
        deaths = Deaths(self._life.family, self._life.main_pid, self._died)
        try:
            async with asyncio.TaskGroup() as self._group:
                self._group.create_task(self._beats())
                self._group.create_task(self._health())
                self._group.create_task(self._rescans(deaths))
        finally:
            deaths.close()

    def wake(self) -> None:
        """The settings have changed."""
        self._wake.set()
        self._wake_health.set()

    def rebase(self) -> None:
        """Somebody has worked on the engine: everything is measured from now on."""
        self._liveness.rebase(time.monotonic())
        self.wake()

    # -- heartbeat

    async def _beats(self) -> None:
        planned_s = 0.0
        while True:
            settings = self._settings()
            self._liveness.limits = limits_of(settings)
            if not self._stood_still(planned_s):
                timeout_s = self._liveness.timeout_s(settings.request_timeout_s, time.monotonic())
                sample = await self._heartbeat.read(timeout_s)
                self._vitals.exposition = self._heartbeat.last
                if not self._stood_still(timeout_s):
                    await self._take(sample)
            planned_s = self._liveness.pause_s(settings.interval_s, settings.heartbeat_interval_s, time.monotonic())
            await _sleep(planned_s, self._wake)

    def _stood_still(self, planned_s: float) -> bool:
        reason = self._liveness.look(time.monotonic(), boottime(), planned_s)
        if reason:
            self._journal.event("clock-gap", reason, priority=5)
        return bool(reason)

    async def _take(self, sample: Sample) -> None:
        finding = self._liveness.scraped(sample)
        vitals = self._vitals
        vitals.last_scrape = sample.outcome
        if sample.outcome == "ok":
            vitals.running = sum(rank.running for rank in sample.ranks.values())
            vitals.waiting = sum(rank.waiting for rank in sample.ranks.values())
            # A verdict begins everything anew, also where it ends nothing: its own figure is the one to tell.
            vitals.heartbeat_at = sample.at - max(self._liveness.still[0], finding.still_s if finding else 0.0)
        self._show(load_of(self._seen, sample) if sample.outcome == "ok" else None)
        self._seen = sample if sample.outcome == "ok" else None
        self._unreadable.heard(sample.outcome)
        for rank in self._liveness.gone:
            self._journal.event("heartbeat-unreadable", f"the engine's metrics no longer show its rank {rank}: it is not watched any more", priority=4)
        if finding is not None:
            await self._find(finding)
        if self._proofs and not vitals.paused:
            for rank in self._liveness.due(sample.at):
                self._spawn(self._ask(rank, self._liveness.asked(rank, time.monotonic())))

    async def _find(self, finding: Finding) -> None:
        excuse = await self._heartbeat.excused() if finding.code == "engine_hung" else ""
        if excuse:
            self._journal.event("would-act", f"left alone, because {excuse} says so: {finding.what}", priority=5, detector=finding.detector)
            return
        kind: type[VllmdError] = TryLater if finding.code == "engine_hung" else EngineFailed
        self._judge.reach(finding.detector, kind(finding.code, finding.what, finding.hint), event=finding.code.replace("_", "-"))

    # -- proofs of life

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """None when the watch is ending: the kernel may tell of deaths until the last moment."""
        try:
            assert self._group is not None
            return self._group.create_task(work)
        except RuntimeError:
            work.close()
            return None

    async def _ask(self, rank: str, canary: Canary) -> None:
        address = rank if len(self._liveness.pulses) > 1 else ALONE
        cpu_s = self._life.family.cpu_s()
        answered = await canaries.ask(self._probe.endpoint, self._life.engine, self._proofs, address, self._settings().canary_timeout_s)
        at = time.monotonic()
        took_s = at - canary.asked_at
        computing = self._life.family.cpu_s() - cpu_s >= BUSY_CORES * took_s
        self._vitals.canaries[answered.reply] += 1
        if answered.reply == "ok":
            self._vitals.canary_s = took_s
        else:
            which = f" of rank {rank}" if address else ""
            self._journal.event("canary", f"proof of life{which} after {took_s:.1f} s: {answered.reply} {answered.detail}".rstrip(), priority=5)
        if answered.reply not in ("timeout", "void"):
            self._liveness.answered()
        finding = self._liveness.replied(rank, canary, answered.reply, at, detail=answered.detail, computing=computing)
        if finding is not None:
            await self._find(finding)
        self._wake.set()  # what became of the heartbeat meanwhile decides over a timeout

    # -- health

    async def _health(self) -> None:
        refusals = Refusals(limit=self._settings().failures)
        while True:
            now = self._settings()
            await _sleep(min(now.interval_s, REFUSED_INTERVAL_S) if refusals.count else now.interval_s, self._wake_health)
            answer = await request(self._probe.endpoint, "GET", self._probe.health_path, headers=self._probe.headers, timeout_s=now.request_timeout_s)
            if answer.outcome == "answered":
                self._liveness.answered()
                self._unreadable.healthy()
            listening = answer.outcome != "refused" or any(map(self._probe.is_ours, self._probe.listeners(self._probe.endpoint)))
            refusals = refusals.after(answer.outcome, answer.status, listening=listening)
            if refusals.reached:
                self._judge.reach("health", _refusing(refusals), event="engine-unhealthy")
                refusals = Refusals(limit=now.failures)

    # -- deaths

    async def _rescans(self, deaths: Deaths) -> None:
        while True:
            deaths.rescan()
            await asyncio.sleep(self._settings().interval_s)

    def _died(self, dead: Dead) -> None:
        self._vitals.deaths += 1
        self._dead = [each for each in self._dead if dead.at - each.at < DEATH_LOOKS_FOR_S] + [dead]
        if self._looker is None or self._looker.done():
            self._looker = self._spawn(self._look_after_death())

    async def _look_after_death(self) -> None:
        """A helper that ended normally leaves /health at 200; EngineCore or a Worker makes it 503 within 0.3 s, for ever."""
        refused = 0
        while time.monotonic() < self._dead[-1].at + DEATH_LOOKS_FOR_S:
            answer = await request(self._probe.endpoint, "GET", self._probe.health_path, headers=self._probe.headers, timeout_s=DEATH_LOOKS_FOR_S)
            refused = refused + 1 if answer.outcome == "answered" and answer.status == 503 else 0
            if refused >= DEATH_REFUSALS:
                self._judge.reach("death", _died(self._dead), event="engine-died")
                return
            await asyncio.sleep(DEATH_LOOK_S)


def _refusing(refusals: Refusals) -> EngineFailed:
    kind = "503 on /health" if refusals.kind == "503" else "connection refused, and the listener is gone"
    what = f"the engine refuses: {refusals.count} times in a row {kind}"
    return EngineFailed("engine_unhealthy", what, "the engine's own lines in the journal say why")


def _died(dead: list[Dead]) -> EngineFailed:
    """Those that died in one moment are told in no order: one takes the other along."""
    named = ", ".join(map(str, dead[:NAMED_MAX])) + (f" and {len(dead) - NAMED_MAX} more" if len(dead) > NAMED_MAX else "")
    what = f"a part of the engine died: {named}; /health says 503 since"
    return EngineFailed("engine_died", what, "its own lines in the journal say why; journalctl -k, where the kernel killed it")


async def _sleep(seconds: float, wake: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(wake.wait(), seconds)
    wake.clear()
