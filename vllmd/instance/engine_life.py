"""One launch of the engine: spawned in its own family, read line by line, proved, terminated, killed to the last process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vllmd.config import show
from vllmd.config.redact import redact_argv, redact_text
from vllmd.config.settings import Log
from vllmd.core import events as ev
from vllmd.core.model import ResolvedModel
from vllmd.core.plan import Command, Plan
from vllmd.engines.protocol import Context, Engine, Guarding, Holding, Preparing, ProofRequest
from vllmd.errors import EngineFailed, TryLater
from vllmd.instance import record
from vllmd.instance.board import Board, now_text
from vllmd.instance.checking import PortHold
from vllmd.instance.clockwork import Clockwork
from vllmd.instance.gpus import Gpus, Need
from vllmd.instance.output import Output, example
from vllmd.instance.probing import Probe, healthy, prove
from vllmd.instance.startwatch import StartWatch
from vllmd.models import store
from vllmd.preflight import ports
from vllmd.system import credentials, stuck
from vllmd.system import launch as launches
from vllmd.system.family import Family
from vllmd.system.files import storage_error
from vllmd.system.host import boot_id
from vllmd.system.journal import Journal
from vllmd.system.lines import LineLimits, LineReader, TokenBucket
from vllmd.system.process import Child, ExitStatus, SpawnSpec, spawn
from vllmd.system.sharedlock import share
from vllmd.system.terminal import Stderr
from vllmd.system.threads import in_thread

_STACKS_S = 2.0


class EngineLife:
    """`post` takes events. Nothing here knows the lifecycle's state."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        context: Context,
        family: Family,
        *,
        post: Callable[[ev.Event], None],
        journal: Journal | Stderr,
        board: Board,
        clockwork: Clockwork,
        client_keys: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self.engine = engine
        self.plan = plan
        self.context = context
        self.family = family
        self._post = post
        self._journal = journal
        self._board = board
        self._state = context.paths.instance_state(plan.instance)
        self._secrets: tuple[str, ...] = plan.command.secrets
        self._client_keys = client_keys  # they change while it runs
        self._configured = (*show.secrets(context.config), *credentials.secrets(context.environ))  # also what the command is not told, and an engine may find and print
        self.output = Output(engine, journal, self._redacted, self._heard)
        self.start = StartWatch(plan.deadlines, clockwork, family.cpu_s)
        self._child: Child | None = None
        self._exit: ExitStatus | None = None
        self._readers: list[LineReader] = []
        self.limit_lines(context.config.log)
        self._background: list[asyncio.Task[None]] = []
        self._model: ResolvedModel | None = None
        self._hold = contextlib.ExitStack()
        self._port = PortHold(context, plan)
        self._health = ""
        self._private: list[Path] = []
        self._stuck: tuple[stuck.Stuck, ...] = ()
        self.gpus = Gpus(context, Need.of(engine, context), journal, say=lambda text: board.progress(None, text))
        self.probe = Probe(
            endpoint=plan.endpoints[0],
            health_path=engine.health_path,
            interval_s=context.config.start.probe_interval_s,
            proof_timeout_s=context.config.start.proof_timeout_s,
            listeners=ports.listeners_of,
            is_ours=family.contains,
            headers=engine.headers(context) if isinstance(engine, Guarding) else {},
        )

    async def sweep(self) -> None:
        """Ends what an earlier life of this instance left (its supervisor was killed): our own, and nothing else."""
        for sweep in (self.family.sweep, partial(launches.recover, self._state)):
            for leftover in await sweep(timeout_s=self.plan.deadlines.kill_s):
                if not leftover.gone:
                    error = await self._unkillable(f"an earlier launch cannot be ended: launch {leftover.launch_id}", leftover.pids)
                    self._journal.event("unkillable", error.what, priority=2, hint=error.hint)
                    raise error
                self._journal.event("leftovers-swept", f"ended what an earlier launch had left: {leftover}", priority=4)

    # -- spawn

    async def launch(self, model: ResolvedModel) -> None:
        """Port lock, cheap checks again, GPUs, launch record, exec. What was started is ended by `kill`, also half-way."""
        self._model = model
        self._hold.callback((await in_thread(lambda: store.hold(model.directory))).close)
        await self._port.take()
        directory = str(await self._prepared(model.directory))
        await self._hold_directories()
        command = self.engine.command(await self.gpus.take(), directory)
        self._board.set(gpus=list(self.gpus.uuids))
        self._secrets = command.secrets
        self._write_private(command)
        launch_id = os.urandom(16).hex()
        self._board.phase("spawn")
        self._board.set(launch_id=launch_id)
        self._journal.bind(launch=launch_id)
        self.family.prepare(launch_id)
        spec = SpawnSpec(
            argv=command.argv,
            env={**command.env, **self.family.environment(launch_id)},
            cgroup=self.family.cgroup_dir,
            cwd=str(self.context.paths.cache),
        )
        self._child = await spawn(spec, lambda pid, start_time: self._write_launch(launch_id, pid, start_time))
        self._attach(self._child)
        self._board.set(engine={**(self._board.document["engine"] or {}), "pid": self._child.pid})
        argv = " ".join(redact_argv(command.argv, command.secrets))
        self._journal.event("engine-spawned", f"engine spawned: {argv}", priority=6, pid=self._child.pid, family=self.family.describe())

    async def _prepared(self, directory: Path) -> Path:
        engine = self.engine
        if not isinstance(engine, Preparing):
            return directory
        try:
            served, said = await in_thread(lambda: engine.prepare(self.context, directory))
        except OSError as error:
            raise storage_error(error, f"prepare {directory}") from error
        if said:
            self._journal.event("model-prepared", said, priority=4 if served == directory else 5, directory=str(served))
        return served

    async def _hold_directories(self) -> None:
        """What the engine runs from, and compiles into, is not removed under it."""
        engine = self.engine
        for directory in engine.holds(self.context) if isinstance(engine, Holding) else ():
            with contextlib.suppress(OSError):  # what is not there, or may not be looked at, the engine itself will miss
                self._hold.callback(await in_thread(partial(share, directory)))

    def _write_private(self, command: Command) -> None:
        for name, content in command.private_files.items():
            path = Path(name)
            try:
                path.unlink(missing_ok=True)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise storage_error(error, f"write {path}") from error
            self._private.append(path)
            with open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(content)

    def _write_launch(self, launch_id: str, pid: int, start_time: int) -> None:
        cgroup, uid = self.family.cgroup_path, os.getuid()
        launch = launches.Launch(launch_id, boot_id(), pid, start_time, cgroup, uid, started_at=now_text())
        try:
            launches.write(self._state, launch)
        except OSError as error:
            raise storage_error(error, f"write {self._state / launches.NAME}") from error

    def _attach(self, child: Child) -> None:
        self.start.begin()
        bucket = TokenBucket(self._limits.lines_per_s)
        self._readers = [
            LineReader(pipe, self.output.line, limits=self._limits, bucket=bucket, on_dropped=self.output.lost)
            for pipe in (child.stdout, child.stderr)
        ]
        self._background.append(asyncio.create_task(self._wait(child)))
        self._background.append(asyncio.create_task(self._expire()))

    def limit_lines(self, log: Log) -> None:
        """How much of the engine's output is passed on from now on."""
        self._limits = LineLimits(log.line_max_bytes, log.lines_per_s)
        for reader in self._readers:
            reader.limit(self._limits)

    async def _wait(self, child: Child) -> None:
        self._exit = await child.wait()
        # Its last lines are still in the pipes; they hold the cause.
        for reader in self._readers:
            reader.close()
        where = f" while {self._board.document['phase']}" if self._board.document["phase"] != "ready" else ""
        cause = self.output.cause()
        what = f"the engine ended by itself ({self._exit.describe()}){where}" + (f": {cause}" if cause else "")
        hint = self._where_its_lines_are()
        self._journal.event("engine-exited", f"the engine's main process is gone ({self._exit.describe()})", priority=5)
        self._post(ev.EngineExited(record.failure_of(EngineFailed("engine_exited", what, hint))))

    def _where_its_lines_are(self) -> str:
        if isinstance(self._journal, Stderr):
            return "its own lines stand above"
        return f"its own lines: journalctl VLLMD_LAUNCH={self._board.document['launch_id']}"

    async def _expire(self) -> None:
        failure = await self.start.expire(lambda: str(self._board.document["phase"]))
        if self._health:
            failure = replace(failure, what=f"{failure.what}; {self._health}")
        kind = "start-timeout" if failure.code == "start_timeout" else "start-stalled"
        self._journal.event(kind, failure.what, priority=3, hint=failure.hint)
        self._post(ev.StartExpired(failure))

    # -- start

    def _heard(self, fact: Any) -> None:
        self.start.fact(fact)
        if fact.phase and fact.phase != self._board.document["phase"] and self._board.document["state"] == "starting":
            self._board.phase(fact.phase)
            self._journal.event("phase", f"phase {fact.phase}", priority=6, phase=fact.phase)
        if fact.fraction is not None:
            self._board.progress(fact.fraction)

    def _unhealthy(self, text: str) -> None:
        if text != self._health:
            self._health = text
            self._board.progress(None, text)

    async def prove(self) -> str:
        """Waits for /health, gives the port's lock back, and asks for the proof of life; returns what proved it."""
        await healthy(self.probe, self._unhealthy)
        self._unhealthy("")
        self._port.release()
        config = self.context.config
        if config.start.proof == "health":
            return "/health"
        self._board.phase("proof")
        return await prove(self.probe, self.proofs(), lambda text: self._board.progress(None, text))

    def proofs(self) -> tuple[ProofRequest, ...]:
        """Of the task; () where a person has said that /health must do."""
        config = self.context.config
        if config.start.proof == "health" or self._model is None:
            return ()
        task = config.serve.task
        task = self.engine.task(self.context, self._model.directory) if task == "auto" else task
        return self.engine.proofs(self.context, task)

    @property
    def main_pid(self) -> int:
        return self._child.pid if self._child is not None else 0

    def rest(self) -> None:
        """The start is over: its clocks stop."""
        for task in self._background[1:]:
            task.cancel()

    def show_example(self) -> None:
        """For a person in the foreground, and for `vllmctl start`: a request that works."""
        if self._model is None:
            return
        sample = self.engine.example(self.context, self._model.directory)
        if sample is not None:
            path, body = sample
            text = example(self.plan.endpoints[0], json.dumps(body), path, key=self._key_words())
            self._board.set(example=text)
            self._journal.event("", f"try: {text}", priority=5)

    def _key_words(self) -> str:
        if not self.probe.headers:
            return ""
        if not self._client_keys():
            return "$VLLM_API_KEY"
        beside, command = Path(sys.argv[0]).with_name("vllmctl"), self.context.paths.vllmctl
        if shutil.which("vllmctl") is None and beside.exists():  # run from a source tree
            command = command.replace("vllmctl", shlex.quote(str(beside.absolute())), 1)
        return f"$({command} api-key show {self.plan.instance})"

    # -- end

    def terminate(self) -> None:
        """SIGTERM to the main process: vLLM drains by itself, as --shutdown-timeout says."""
        if self._child is not None and self._exit is None:
            self._child.signal(signal.SIGTERM)

    async def kill(self, *, await_memory: bool = True) -> TryLater | None:
        """Kills what is left of the launch, and waits for the memory of its GPUs; None when all of it is done."""
        for task in self._background:
            task.cancel()
        self.family.kill()
        empty = await self.family.wait_empty(self.plan.deadlines.kill_s)
        for reader in self._readers:
            reader.close()
        self._clean()
        if not empty:
            return await self._unkillable("processes cannot be killed", await in_thread(self.family.pids))
        if self._child is not None:
            self._child.close()
            # vLLM leaves the file of its socket behind, and fails on one that it finds.
            self._remove(*(Path(each.path) for each in self.plan.endpoints if each.kind == "uds"))
        self.family.remove()
        self._remove(self._state / launches.NAME)
        left = await self.gpus.returned() if await_memory else None
        self.gpus.release()
        return left

    async def _unkillable(self, what: str, pids: Iterable[int]) -> TryLater:
        """Named with where they hang in the kernel. Nobody waits long for that: a read of their stacks may hang as they do."""
        pids = tuple(pids)
        self._stuck = tuple(stuck.Stuck(pid) for pid in pids)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STACKS_S):
                self._stuck = await in_thread(lambda: stuck.look(pids)) or self._stuck
        named = stuck.describe(self._stuck) or "unknown processes"
        hint = "They hang in the kernel, mostly in a GPU driver or a dead network file system: `journalctl -k -e`. The host may need a reboot."
        error = TryLater("unkillable", f"{what}: {named}", hint)
        error.more = {"unkillable": [each.as_dict() for each in self._stuck]}
        return error

    def _clean(self) -> None:
        self._port.release()
        self._hold.close()
        self._remove(*self._private)

    def _remove(self, *paths: Path) -> None:
        """A file system that has become read-only keeps no instance from ending; the next start copes with what is left."""
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._journal.event("", f"cannot remove {path}: {error.strerror}", priority=4)

    def last_words(self) -> dict[str, Any]:
        """What last.json says beside the error."""
        exit_status = self._exit.describe() if self._exit else None
        words = {"engine_exit": exit_status, "phase": self._board.document["phase"], "lines": list(self.output.lines)[-20:]}
        return words | ({"unkillable": [each.as_dict() for each in self._stuck]} if self._stuck else {})

    @property
    def secrets(self) -> tuple[str, ...]:
        """What is taken out of everything that is kept or shown."""
        return (*self._secrets, *self._configured, *self._client_keys())

    def _redacted(self, text: str) -> str:
        return redact_text(text, self.secrets)
