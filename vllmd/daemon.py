"""The composition root of `vllmd run`: builds the adapters, feeds events to the lifecycle's table, performs its effects.

One task owns the state (`run`); everything else posts events. Whatever can block lives in a child or in a thread that
nobody waits for.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, assert_never

from vllmd import configured, stages
from vllmd.config.redact import knower
from vllmd.configured import Prepared
from vllmd.core import events as ev
from vllmd.core.lifecycle import Impossible, Life, State, step
from vllmd.core.plan import Plan
from vllmd.engines.protocol import Context
from vllmd.errors import Status, VllmdError
from vllmd.gpu.client import Client
from vllmd.instance import causes, generations, metrics, record, reload, signals
from vllmd.instance.access import Access, NoAccess, opened
from vllmd.instance.board import Board
from vllmd.instance.checking import check_host
from vllmd.instance.clockwork import Clockwork
from vllmd.instance.control import serve_control
from vllmd.instance.engine_life import EngineLife
from vllmd.instance.gpuwatch import GpuWatch
from vllmd.instance.incident import Examiner
from vllmd.instance.judging import Judge
from vllmd.instance.locking import InstanceLock
from vllmd.instance.metric_samples import Facts
from vllmd.instance.pausing import PAUSABLE, Pausing
from vllmd.instance.resolution import Resolution
from vllmd.instance.vitals import Vitals
from vllmd.instance.watching import Watch
from vllmd.instance.works import Works
from vllmd.system.cgroup import choose_family
from vllmd.system.journal import Journal
from vllmd.system.notify import Notifier, NullNotifier
from vllmd.system.publishing import Publisher
from vllmd.system.sink import LEVELS
from vllmd.system.terminal import Stderr
from vllmd.system.threads import in_thread, keep_spare

TICK = object()
"""Goes through the queue of events like any other: WATCHDOG=1 is sent when it comes out, so it says that the loop turns."""

STAGE_EVENTS = {"preflight": "preflight-failed", "resolve": "model-failed"}


class Daemon:
    """One instance, from its configuration to its exit status."""

    def __init__(self, prepared: Prepared, notifier: Notifier | NullNotifier, journal: Journal | Stderr) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.notifier = notifier
        self.journal = journal
        self.life = Life()
        paths, name = prepared.paths, prepared.instance
        self._redact = journal.redact = knower(prepared.secrets())
        self.board = Board(
            name,
            paths.instance_runtime(name) / "status.json",
            notifier.status,
            vllmctl=paths.vllmctl,
            redact=self._redact,
        )
        self.clockwork = Clockwork(notifier)
        self.vitals = Vitals()
        self.resolution = Resolution(self.board, self.clockwork, journal, post=self.post, state=lambda: self.life.state, moved=self._model_moved)
        self.judge = Judge(journal, self.vitals, self.post, lambda: self.config.watch)
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._works = Works(self._work_failed)
        self._exit: int | None = None
        self._plan: Plan | None = None
        self._context: Context | None = None
        self.examiner = Examiner(prepared, self.board, journal, self.vitals)
        self._engine: EngineLife | None = None
        self._watcher: Watch | None = None
        self.pausing = Pausing(
            self.board, self.vitals, journal, self.clockwork, post=self.post, state=lambda: self.life.state, on_end=self._rebase_watch
        )
        self._publisher: Publisher | None = None
        self.access: Access | NoAccess = NoAccess()
        self.facts = Facts(
            self.board,
            self.vitals,
            watch=lambda: self.config.watch,
            journal_dropped=lambda: journal.dropped,
            lines_dropped=lambda: self._engine.output.dropped if self._engine else 0,
            refusals=lambda: self.access.refusals(),
            keys=lambda: self.access.count,
        )

    # -- the one owner of the state

    async def run(self) -> int:
        """Runs the instance to its end; returns the exit status."""
        signals.listen(self.post)
        keep_spare()
        self._apply_log()
        self.journal.attach(asyncio.get_running_loop())
        self.journal.told = self.board.told
        with InstanceLock(self.prepared.paths, self.prepared.instance):
            figures = metrics.route(self.facts)
            control = await serve_control(self.board, figures, self.pausing, lambda: self.access)
            publisher = self._publisher = Publisher(f"vllmd-{self.prepared.instance}.prom", figures, self.journal)
            publisher.apply(self.config.metrics)
            self._works.begin("ticks", self._ticks())
            self._works.begin("causes", self._remember())
            try:
                await self._begin()
                return await self._turn()
            except VllmdError as error:  # before the life began; whoever reads status.json must not wait for it
                self.board.state(str(State.STOPPED), record.failure_of(error))
                raise
            finally:
                self._works.cancel_all()
                await publisher.close()
                await control.close()
                self.access.close()
                self.journal.told = lambda _event, _text, _priority: None
                self.board.close()
                signals.deafen()

    async def _remember(self) -> None:
        """What earlier lives ended of, for the metrics; nothing waits for it."""
        directory = self.prepared.paths.instance_state(self.prepared.instance)
        known = await in_thread(lambda: causes.read(directory))
        self.facts.failures, self.facts.failed_at = known.restarts, {each.code: each.at for each in known.last}

    async def _begin(self) -> None:
        selected = configured.model_request(self.config, self.prepared.paths).selected
        if selected:
            self._context = stages.context(self.prepared)
            self._plan = stages.plan(self.prepared, self._context)
            if self.config.serve.auth == "key":
                self.access, self._context = await opened(self.prepared, self._context, self.journal)
            self.board.plan(self._plan)
            family = choose_family(self.prepared.environ)
            self._engine = EngineLife(
                self.prepared.engine,
                self._plan,
                self._context,
                family,
                post=self.post,
                journal=self.journal,
                board=self.board,
                clockwork=self.clockwork,
                client_keys=lambda: self.access.client_keys,
            )
            for warning in self._plan.warnings:
                self.journal.event("starting", warning, priority=4)
            await self._engine.sweep()
        self.post(ev.Begun(selected))

    async def _turn(self) -> int:
        while self._exit is None:
            event = await self._events.get()
            if event is TICK:
                self.notifier.watchdog()
            else:
                self._advance(event)
        return self._exit

    def _advance(self, event: ev.Event) -> None:
        if isinstance(event, ev.VerdictReached):
            self.examiner.heard(event.failure)  # also one that comes after the exit that it explains
        try:
            life, effects = step(self.life, event)
        except Impossible as error:
            self.journal.event("failed", f"bug: {error}", priority=3)
            if isinstance(event, ev.Faulted):
                return
            life, effects = step(self.life, ev.Faulted(record.bug(error)))
        changed, self.life = life.state is not self.life.state, life
        self.pausing.pending(life.pending)
        if changed:
            if life.state not in PAUSABLE:
                self.pausing.forget()
            self.board.state(str(life.state), life.failure)
        for effect in effects:
            self._perform(effect)

    def post(self, event: ev.Event) -> None:
        self._events.put_nowait(event)

    # -- effects

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.RunPreflight():
                self._works.begin("preflight", self._preflight())
            case ev.ResolveModel():
                self._works.begin("resolve", self._resolve())
            case ev.LaunchEngine():
                self._works.begin("launch", self._launch())
            case ev.ProbeStart():
                self._works.begin("probe", self._probe())
            case ev.TellReady():
                self._ready()
            case ev.WatchEngine():
                self._works.begin("watch", self._watch())
            case ev.TellStopping():
                self._stopping()
            case ev.TerminateEngine(during_start):
                self._works.begin("drain", self._drain(during_start=during_start))
            case ev.GatherEvidence(failure):
                self._works.begin("evidence", self._examine(failure))
            case ev.KillTree():
                self._works.begin("kill", self._kill())
            case ev.RecordFailure(failure):
                self._record(failure)
            case ev.ReloadConfiguration():
                self._reload()
            case ev.Finish(status):
                self._finish(status)
            case _:
                assert_never(effect)

    async def _preflight(self) -> None:
        self.clockwork.allow(self.config.preflight.gpu_timeout_s + 60)
        assert self._plan is not None
        assert self._context is not None
        assert self._engine is not None
        report = await check_host(self.prepared.engine, self._context, self._plan, self.journal)
        self._engine.gpus.examined(report.gpu_check_source, report.gpus)
        self.post(ev.PreflightPassed())

    async def _resolve(self) -> None:
        assert self._plan is not None
        await self.resolution.run(self._plan.model, self.config.model, self.prepared)

    def _model_moved(self) -> None:
        if self._engine is not None:
            self._engine.start.strong()  # bytes of the model that are being verified beside the start

    async def _launch(self) -> None:
        assert self._engine is not None
        assert self.resolution.model is not None
        self.clockwork.allow(self._engine.gpus.wait_s + 60)
        await self._engine.launch(self.resolution.model)
        self._works.begin("gpu-watch", self._watch_gpus())
        self.post(ev.EngineSpawned())

    async def _watch_gpus(self) -> None:
        assert self._engine is not None
        paths, engine = self.prepared.paths, self._engine
        client = Client(paths, self.config.gpu_watch)
        watch = GpuWatch(
            paths, engine.gpus, engine.family, judge=self.judge, vitals=self.vitals, journal=self.journal, settings=lambda: self.config.watch, client=client
        )
        try:
            await watch.run()
        except Exception as error:  # a bug in what only looks on is said, and ends no engine that serves
            record.unexpected(error, self.journal)

    async def _probe(self) -> None:
        assert self._engine is not None
        proof = await self._engine.prove()
        self.journal.event("phase", f"proof of life: {proof}", priority=6, phase="proof")
        self.post(ev.ProofPassed())

    def _ready(self) -> None:
        self.clockwork.rest()
        self.board.phase("ready" if self.life.state is State.READY else "unconfigured")
        self.board.now()
        self.notifier.ready(self.board.sentence())
        self.journal.event(
            "engine-ready" if self.life.state is State.READY else "unconfigured",
            f"{self.board.sentence()} (after {self.board.age_s:.1f} s)",
            priority=5,
        )
        if self._engine is not None:
            self.examiner.ready()
            self._engine.rest()
            self._engine.show_example()
            self._works.begin("generation", self._generation())

    async def _generation(self) -> None:
        """What reached READY is kept, to go back to; nothing waits for it, and nothing fails by it."""
        assert self._plan is not None
        assert self.resolution.model is not None
        work = generations.remember(self.prepared.paths, self.prepared.instance, self.prepared.loaded, self._plan, self.resolution.model)
        try:
            written = await in_thread(work)
        except (OSError, VllmdError) as error:
            self.journal.event("generation", f"this generation could not be kept: {error}", priority=4, hint=f"vllmctl generations {self.prepared.instance}")
            return
        if written.is_new:
            self.journal.event("generation", f"generation {written.number} reached READY", priority=6)

    async def _watch(self) -> None:
        assert self._engine is not None
        self._watcher = Watch(self._engine, self.judge, self.vitals, self.journal, lambda: self.config.watch, show=self.board.load)
        await self._watcher.run()

    def _rebase_watch(self) -> None:
        if self._watcher is not None:
            self._watcher.rebase()

    def _stopping(self) -> None:
        bound = self._plan.deadlines.stop_s if self._plan else 10.0
        if self._engine is not None:
            self._engine.rest()
        self.notifier.stopping(self.board.sentence())
        self.clockwork.allow(bound + 10)
        self.journal.event("stopping", self.board.sentence(), priority=6)

    async def _drain(self, *, during_start: bool) -> None:
        assert self._engine is not None
        deadlines = self._engine.plan.deadlines
        self._works.cancel("probe", "watch", "gpu-watch", "resolve")
        self._engine.terminate()
        await asyncio.sleep(deadlines.start_grace_s if during_start else deadlines.drain_s)
        self.post(ev.DrainExpired())

    async def _examine(self, failure: ev.Failure) -> None:
        self._works.cancel("probe", "watch", "drain")  # the GPU watch goes on: what it hears now may be the cause
        assert self._engine is not None
        self.post(ev.EvidenceGathered(await self.examiner.examine(failure, self._engine, self.config)))

    async def _kill(self) -> None:
        began = time.monotonic()
        await self._works.end_all_but("ticks", "kill")
        if self._engine is None:
            self.post(ev.TreeEmptied())
            return
        failure = self.life.failure
        left = await self._engine.kill(await_memory=failure is None or failure.status != Status.UNAVAILABLE)
        if left is not None:
            self.journal.event("unkillable" if left.code == "unkillable" else "gpu-memory-not-back", left.what, priority=2, hint=left.hint)
            self.post(ev.KillExpired(record.failure_of(left)))
            return
        self.journal.event("stopped", f"nothing is left ({time.monotonic() - began:.2f} s)", priority=6)
        self.post(ev.TreeEmptied())

    def _record(self, failure: ev.Failure) -> None:
        """Now, not at the end: the teardown may be cut short."""
        incident = self.examiner.note(failure)
        said = f"{failure.what} [vllmctl incidents {self.prepared.instance} {incident}]" if incident else failure.what
        self.journal.event(
            "failed", said, priority=3, code=failure.code, hint=failure.hint, exit_status=failure.status, incident=incident
        )
        self._write_last(failure.status)

    def _finish(self, status: int) -> None:
        self._write_last(status)
        self._exit = status

    def _write_last(self, status: int) -> None:
        directory = self.prepared.paths.instance_state(self.prepared.instance)
        launch_id = self.board.document["launch_id"]
        more = {"incident": self.examiner.incident, **(self._engine.last_words() if self._engine else {})}
        complaint = record.write_last(
            directory, self.prepared.instance, status, self.life.failure, redact=self._redact, launch_id=launch_id, **more
        )
        if complaint:
            self.journal.event("failed", complaint, priority=4)

    def _reload(self) -> None:
        running = self._context.installed.executable if self._context else ""
        taken = reload.read_again(self.prepared, self.config, self.journal, running)
        if taken is not None:
            self.config, waiting = taken
            self.board.set(needs_restart=list(waiting))
            self._apply_log()
            self.access.apply(self.config.serve)
            if self._publisher is not None:
                self._publisher.apply(self.config.metrics)
            if self._watcher is not None:  # it may sleep for an interval that was long until now
                self._watcher.wake()

    def _apply_log(self) -> None:
        self.journal.level = LEVELS[self.config.log.level]
        if self._engine is not None:
            self._engine.limit_lines(self.config.log)

    def _work_failed(self, name: str, error: Exception) -> None:
        if not isinstance(error, VllmdError):
            fault = record.unexpected(error, self.journal)
            # A teardown that fails must not keep the instance from ending.
            self.post(ev.KillExpired(fault) if name == "kill" else ev.Faulted(fault))
            return
        if name == "evidence":  # nothing that a collector meets may keep the instance from ending
            self.post(ev.Faulted(record.failure_of(error)))
            return
        if name in STAGE_EVENTS:
            self.journal.event(STAGE_EVENTS[name], error.what, priority=3, hint=error.hint)
        self.post(ev.StageFailed(record.failure_of(error)))

    async def _ticks(self) -> None:
        """Every second at most: the clocks that systemd must know, and the watchdog's turn."""
        interval = min(1.0, self.notifier.watchdog_s / 3) if self.notifier.watchdog_s else 1.0
        while True:
            self._events.put_nowait(TICK)
            self.clockwork.tell()
            self.examiner.tick()
            await asyncio.sleep(interval)
