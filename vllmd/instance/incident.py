"""A failure, examined before anything is killed: evidence gathered, its cause named, an incident written. Within EXAMINE_S.

Every collector has its own deadline, works in threads or children that nobody waits for, and is cut at its own size;
what one of them meets is a note in the incident, and never keeps the instance from ending.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vllmd.config.settings import Config
from vllmd.configured import Prepared
from vllmd.core import faults
from vllmd.core.events import Failure
from vllmd.core.faults import Cause, Facts, GpuFact, Signs
from vllmd.core.fingerprint import fingerprint, of_traceback, steady
from vllmd.engines.protocol import Diagnosing
from vllmd.errors import Status
from vllmd.instance import badcache, causes, incident_store
from vllmd.instance import evidence_host as host
from vllmd.instance.board import Board, now_text
from vllmd.instance.engine_life import EngineLife
from vllmd.instance.evidence_processes import Processes
from vllmd.instance.evidence_sheet import Sheet, gathered
from vllmd.instance.evidence_stacks import find_py_spy, python_stacks
from vllmd.instance.incident_report import Material, gpu_total_gib, parts, plain_summary, told
from vllmd.instance.vitals import Vitals
from vllmd.preflight import child
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr
from vllmd.system.threads import in_thread

EXAMINE_S, FIND_S, GATHER_S, DECIDE_S, CACHE_S, WRITE_S = 5.0, 0.5, 2.4, 0.5, 0.4, 1.0
"""The whole, and its steps one after the other."""
KNOWN_S = 1.0
"""What earlier lives have left, read while the evidence is gathered."""
RESERVE_S = 0.2
KIB = 1 << 10
OOM_SAMPLES, OOM_SAMPLE_S = 3, 10.0
SERVING_LINES_S = 30.0
"""An error that a request met an hour ago is not what the engine dies of; the whole of a start may be."""
GPU_FACT_S, GPU_LATE_S = 60.0, 0.5
T = TypeVar("T")
_EXIT_CODE, _EXIT_SIGNAL = "exit status ", "killed by "


@dataclass(frozen=True, slots=True)
class Examined:
    """`incident` '' where none could be written."""

    failure: Failure
    occurrence: causes.Occurrence
    incident: str = ""


async def _within(seconds: float, work: Awaitable[T], otherwise: T) -> T:
    """A step that hangs costs what it would have found, and not the steps after it."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except (TimeoutError, OSError):
        return otherwise


class Examiner:
    """`tick` is to be called about every second."""

    def __init__(self, prepared: Prepared, board: Board, journal: Journal | Stderr, vitals: Vitals) -> None:
        self._prepared = prepared
        self._board = board
        self._journal = journal
        self._vitals = vitals
        self._state = prepared.paths.instance_state(prepared.instance)
        self._oom: deque[int] = deque([host.host_oom_kills()], maxlen=OOM_SAMPLES)
        self._oom_at = time.monotonic()
        self._gpu: deque[tuple[float, GpuFact]] = deque(maxlen=32)
        self.examined: Examined | None = None

    def tick(self) -> None:
        """Keeps the count of the host's out-of-memory kills of half a minute ago."""
        if time.monotonic() - self._oom_at >= OOM_SAMPLE_S:
            self._oom_at = time.monotonic()
            self._oom.append(host.host_oom_kills())

    def heard(self, verdict: Failure) -> None:
        """A verdict over one of our GPUs may be the cause of what the engine dies of, for a minute."""
        if verdict.code.startswith("gpu_"):
            self._gpu.append((time.monotonic(), GpuFact(verdict.what, verdict.hint, verdict.status == Status.UNAVAILABLE)))

    def ready(self) -> None:
        """The engine serves: its caches are good."""
        try:
            badcache.forget(self._state)
        except OSError as error:
            self._journal.event("", f"cannot remove {self._state / badcache.MARKER}: {error.strerror}", priority=4)

    @property
    def incident(self) -> str:
        return self.examined.incident if self.examined else ""

    def note(self, failure: Failure) -> str:
        """Counts the failure among those of all lives; returns its incident, '' where none was written."""
        if self.examined is None:
            coming = causes.read(self._state).next(now_text(), failure.code, "", "")
        else:
            coming = replace(self.examined.occurrence, incident=self.incident)
        complaint = causes.note(self._state, coming)
        if complaint:
            self._journal.event("evidence-incomplete", complaint, priority=4)
        return self.incident

    async def examine(self, failure: Failure, engine: EngineLife, config: Config) -> Failure:
        """The failure with its cause named, as far as that was found out; `examined` says the rest."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(EXAMINE_S):
                return await self._examine(failure, engine, config, began)
        except asyncio.CancelledError:  # a stop: nobody waits for children any more
            child.kill_running()
            raise
        except TimeoutError:
            self._journal.event("evidence-incomplete", f"the evidence took longer than {EXAMINE_S:g} s and was given up", priority=4)
        except Exception as error:
            self._journal.event("evidence-incomplete", f"the evidence could not be gathered: {type(error).__name__}: {error}", priority=4)
        return self.examined.failure if self.examined else failure

    async def _late_verdicts(self) -> None:
        """The kernel tells of a GPU's fault about when the engine dies of it."""
        if self._vitals.gpus is not None and not self._gpu:
            await asyncio.sleep(GPU_LATE_S)

    async def _known(self) -> tuple[causes.Causes, str]:
        """The failures so far, and a name for the incident."""
        folder = self._state / incident_store.FOLDER
        return await _within(KNOWN_S, in_thread(lambda: (causes.read(self._state), incident_store.new_id(folder))), (causes.Causes(), incident_store.new_id()))

    async def _examine(self, failure: Failure, engine: EngineLife, config: Config, began: float) -> Failure:
        sheets, (known, ident), _ = await asyncio.gather(self._gather(engine), self._known(), self._late_verdicts())
        facts = self._facts(failure, engine)
        signs = engine.engine.signs if isinstance(engine.engine, Diagnosing) else Signs()
        cause = await _within(DECIDE_S, in_thread(lambda: faults.decide(facts, signs)), Cause(failure))
        mark = of_traceback(cause.traceback) if cause.traceback else fingerprint(facts.signal or cause.code, (), [facts.phase, steady(failure.what)])
        # Now: whatever hangs after this costs neither the cause nor its status.
        self.examined = Examined(cause.failure, known.next(now_text(), cause.code, mark, ident))
        cause = await self._cured(cause, engine, ident)
        coming = known.next(now_text(), cause.code, mark, ident)
        final = faults.again(cause.failure, coming.count, coming.since)
        self.examined = Examined(final, coming)
        summary = {"schema": 1, "id": ident, "instance": self._prepared.instance, **told(final, facts, coming, self._board, self._vitals, began)}
        summary["took_s"] = round(time.monotonic() - began, 3)
        # What the others have left of the time: a disk that is slow now takes it in two seconds, and there is no second chance.
        left_s = max(WRITE_S, EXAMINE_S - RESERVE_S - (time.monotonic() - began))
        await self._write(ident, sheets, cause, list(engine.output.lines), summary, config, left_s, engine.secrets)
        self._tell(cause, final, ident if self.examined.incident else "")
        return final

    def _tell(self, cause: Cause, final: Failure, incident: str) -> None:
        if cause.event:
            self._journal.event(cause.event, final.what, priority=3, hint=final.hint, code=final.code, incident=incident)

    # -- gathering

    async def _gather(self, engine: EngineLife) -> list[Sheet]:
        pids = await _within(FIND_S, in_thread(engine.family.pids), ())
        processes = Processes(pids)
        program = find_py_spy(engine.plan.installed.executable, self._prepared.environ)

        async def stacks(sheet: Sheet) -> None:
            await processes.ranked()
            if not program:
                sheet.note = "py-spy is not installed, neither beside the engine nor on PATH: waits.txt shows what the kernel knows"
                return
            await python_stacks(sheet, program, processes.largest(len(pids)))

        async def waits(sheet: Sheet) -> None:
            await processes.ranked()
            await processes.waits(sheet)

        def collect(name: str, limit: int, work: Callable[[Sheet], Awaitable[None]]) -> Awaitable[Sheet]:
            return gathered(Sheet(name, limit), GATHER_S, work)

        return list(
            await asyncio.gather(
                collect("stacks.txt", 512 * KIB, stacks),
                collect("processes.txt", 64 * KIB, processes.table),
                collect("waits.txt", 512 * KIB, waits),
                collect("cgroup.txt", 128 * KIB, lambda sheet: host.accounts(sheet, engine.family.cgroup_dir)),
                collect("kernel.txt", 64 * KIB, host.kernel_lines),
            )
        )

    def _facts(self, failure: Failure, engine: EngineLife) -> Facts:
        group = engine.family.cgroup_dir
        kills = host.oom_kills(group)
        now = time.monotonic()
        ended = str(engine.last_words()["engine_exit"] or "")
        code = ended.removeprefix(_EXIT_CODE)
        serving = self._board.document["phase"] == "ready"
        return Facts(
            failure,
            serving=serving,
            phase=self._board.document["phase"],
            exit=ended,
            exit_code=int(code) if code.isdigit() else None,
            signal=ended.removeprefix(_EXIT_SIGNAL).split()[0] if ended.startswith(_EXIT_SIGNAL) else "",
            oom_kills=kills or 0,
            host_oom_kills=host.host_oom_kills() - self._oom[0] if kills is None else 0,
            memory_text=host.memory_text(group),
            lines=engine.output.recent(SERVING_LINES_S if serving else math.inf),
            gpu=tuple(fact for at, fact in self._gpu if now - at < GPU_FACT_S),
            memory_fraction=engine.engine.memory_fraction(engine.context),
            gpu_total_gib=gpu_total_gib(self._vitals.gpus),
        )

    # -- what is done about it

    async def _cured(self, cause: Cause, engine: EngineLife, ident: str) -> Cause:
        """A poisoned cache is moved aside; where that has been tried, it was not the cache."""
        plugin = engine.engine
        if cause.code != "compile_cache_poisoned" or not isinstance(plugin, Diagnosing):
            return cause
        context = engine.context
        try:
            async with asyncio.timeout(CACHE_S):
                moved = await badcache.move_aside(self._state, context.paths.cache, plugin.compile_caches(context), cause.quote, ident)
        except (OSError, TimeoutError) as error:
            self._journal.event("evidence-incomplete", f"the cache of compiled code could not be moved aside: {error}", priority=4)
            return replace(cause, failure=replace(cause.failure, hint=f"remove it by hand, below {context.paths.cache}"))
        if moved is None:
            hint = "it was moved aside before, or there is none: the compilation itself fails; engine.args `enforce-eager: true` does without it"
            return replace(cause, failure=replace(cause.failure, hint=hint))
        self._journal.event("cache-moved", f"moved the cache of compiled code aside: {moved[0]} is now {moved[1]}", priority=4, incident=ident)
        return cause

    # -- writing

    async def _write(self, ident: str, sheets: list[Sheet], cause: Cause, lines: Sequence[str], summary: dict[str, Any], config: Config, left_s: float, secrets: tuple[str, ...]) -> None:
        folder, keep = self._state / incident_store.FOLDER, config.watch.keep_incidents
        loaded = replace(self._prepared.loaded, config=config)
        told = tuple(dict.fromkeys((*self._prepared.secrets(config), *secrets)))
        facts = Material(cause, lines, sheets, loaded, told, self._vitals.gpus, self._vitals.exposition.decode(errors="replace"))

        def work() -> str:
            return incident_store.write(folder, ident, parts(facts), plain_summary(summary, told), keep=keep)

        try:
            async with asyncio.timeout(left_s):
                complaint = await in_thread(work)
        except TimeoutError:
            complaint = f"{folder} did not take it within {left_s:.1f} s"
            self._journal.event("evidence-incomplete", f"the incident {ident} could not be written: {complaint}", priority=4)
            return
        except OSError as error:
            self._journal.event("evidence-incomplete", f"the incident {ident} could not be written to {folder}: {error.strerror}", priority=4)
            return
        if self.examined is not None:
            self.examined = replace(self.examined, incident=ident)
        if complaint:
            self._journal.event("evidence-incomplete", f"of the incident {ident} is missing: {complaint}", priority=4, incident=ident)
