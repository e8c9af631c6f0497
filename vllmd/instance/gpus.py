"""The instance's GPUs, from right before the spawn until their memory is back: chosen, leased, gated, given back.

    choose -> lease -> is the memory there? (wait) -> [the engine's life] -> is the memory back? (wait) -> release

A host without a driver costs one look, and everything here is then empty. The driver is asked in a child under a deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from vllmd.config.settings import Config
from vllmd.core import gpu_choice
from vllmd.core.gpu_choice import Banned, Choice, Device, Refusal, Rules
from vllmd.core.xids import HINTS
from vllmd.engines.protocol import Context, Counting, Engine
from vllmd.errors import GpuUnavailable, TryLater, VllmdError
from vllmd.gpu import leases, quarantine
from vllmd.gpu.leases import NAME, Claim, Held, Leases
from vllmd.preflight import devices
from vllmd.preflight.child import kill_running
from vllmd.preflight.devices import Seen
from vllmd.preflight.report import Gpu
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr
from vllmd.system.threads import in_thread

POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Need:
    """What the engine will ask for: a share of each GPU's memory (0: unknown), of `count` GPUs (None: of all; 0: it was
    built for none)."""

    fraction: float = 0.0
    count: int | None = None

    @classmethod
    def of(cls, engine: Engine, context: Context) -> Need:
        count = engine.devices(context) if isinstance(engine, Counting) else None
        return cls(engine.memory_fraction(context), count)

    def mib(self, config: Config, total_mib: int) -> int:
        given = config.preflight.gpu_min_free
        return int(self.fraction * total_mib) if given == "auto" else int(given)


class Gpus:
    """`say` shows what is being waited for."""

    def __init__(self, context: Context, need: Need, journal: Journal | Stderr, *, say: Callable[[str], None]) -> None:
        self._context = context
        self._need = need
        self._journal = journal
        self._say = say
        self._leases = Leases()
        self._choice = Choice()
        self._claimed: list[Claim] = []
        self._before: tuple[Device, ...] = ()
        self._source = ""
        self.has_driver = True
        """What preflight found out; without a driver nothing is asked again."""

    @property
    def uuids(self) -> tuple[str, ...]:
        """Of whole GPUs, those of MIG devices included; () where there is none, or none is known."""
        return tuple(each.uuid for each in self._choice.devices if each.uuid)

    @property
    def wait_s(self) -> float:
        """The longest that `take` can last."""
        settings = self._context.config.preflight
        return settings.gpu_wait_s + 2 * settings.gpu_timeout_s

    @property
    def _wants_none(self) -> bool:
        """An engine without GPU support that is shown all GPUs keeps them from nobody."""
        gpus = self._context.config.gpus
        return gpus in ("none", ()) or (gpus == "all" and self._need.count == 0)

    # -- after preflight

    def examined(self, source: str, found: Iterable[Gpu]) -> None:
        """What preflight saw. GpuUnavailable where a GPU of ours is quarantined: said before a model is downloaded for it."""
        config = self._context.config
        self.has_driver = source != "skipped" and not self._wants_none
        if not self.has_driver or config.gpus == "none" or (isinstance(config.gpus, tuple) and any(each.startswith("MIG") for each in config.gpus)):
            return
        seen = [Device(each.index, each.uuid, each.name, lost=each.lost) for each in found]
        visible = self._context.environ.get("CUDA_VISIBLE_DEVICES")
        refusal = gpu_choice.choose(seen, config.gpus, Rules(quarantined=self._banned()), visible)
        if isinstance(refusal, Refusal):
            raise self._error(refusal)

    # -- before the spawn

    async def take(self) -> Context:
        """The context to make the engine's command from: its GPUs by their UUIDs, where they were chosen here. GpuUnavailable
        where a person must act; TryLater where they are still not free after `preflight.gpu_wait_s`."""
        config = self._context.config
        if self._wants_none:
            return self._context
        if not self.has_driver:
            self._lease_unseen()
            return self._context
        end = time.monotonic() + config.preflight.gpu_wait_s
        said = ""
        while (waiting := await self._attempt()) is not None:
            if time.monotonic() >= end:
                self.release()
                raise waiting
            if waiting.what != said:
                said = waiting.what
                self._say(f"waiting for GPUs: {said}")
                self._journal.event("gpu-waiting", f"the start waits for GPUs, {config.preflight.gpu_wait_s:g} s at most: {said}", priority=4)
            await asyncio.sleep(min(POLL_S, max(0.0, end - time.monotonic())))
        return self._as_chosen()

    async def _attempt(self) -> VllmdError | None:
        """None when they are ours and have the memory; else what is being waited for. What no waiting helps is raised."""
        seen = await self._look()
        if seen.source == "skipped":
            self._lease_unseen()
            return None
        self._source = seen.source
        had = self._claimed
        waiting = self._lease(seen)
        if waiting is not None:
            return waiting
        if self._claimed != had:
            seen = await self._look()  # what was seen before the lease may be another start's by now
        return self._gate(seen)

    def _lease(self, seen: Seen) -> VllmdError | None:
        """Of a number of GPUs the next best is tried where another start was faster."""
        held: VllmdError | None = None
        for _ in range(len(seen.devices) or 1 if isinstance(self._context.config.gpus, int) else 1):
            choice = self._choose(seen)
            if isinstance(choice, Refusal):
                return held or self._error(choice)
            held = self._take(choice)
            if held is None:
                self._choice = choice
                return None
        return held

    def _take(self, choice: Choice) -> Held | None:
        claims = self._claims(choice)
        if claims != self._claimed:
            self.release()
            try:
                self._leases = leases.take(self._context.paths, claims, self._context.instance)
            except Held as held:
                return held
            self._claimed = claims
        return None

    async def _look(self) -> Seen:
        timeout_s = self._context.config.preflight.gpu_timeout_s
        try:
            seen = await in_thread(lambda: devices.look(timeout_s))
        finally:
            kill_running()
        if seen.hung_in:
            what = f"the GPU driver did not answer within {timeout_s:g} s (stuck in {seen.hung_in})"
            raise GpuUnavailable("gpu_driver_hung", what, "`journalctl -k -g NVRM` says why; a wedged driver mostly needs a reboot.")
        return seen

    def _choose(self, seen: Seen) -> Choice | Refusal:
        """A number is chosen once: in later rounds what was leased stays ours."""
        gpus = self._choice.tokens if self._claimed and self._choice.tokens else self._context.config.gpus
        return gpu_choice.choose(seen.devices, gpus, self._rules(), self._context.environ.get("CUDA_VISIBLE_DEVICES"))

    def _rules(self) -> Rules:
        config = self._context.config
        ours = set(self._leases.uuids)
        leased = {
            uuid: " and ".join(map(str, holders))
            for uuid, holders in leases.holders(self._context.paths).items()
            if uuid not in ours and not (config.gpus_shared and all(each.shared for each in holders))
        }
        return Rules(lambda total: self._need.mib(config, total), self._banned(), leased)

    def _claims(self, choice: Choice) -> list[Claim]:
        shared = self._context.config.gpus_shared
        whole = [Claim(each.uuid, shared) for each in choice.whole if NAME.fullmatch(each.uuid)]
        parts = [Claim(part.uuid, shared) for part, _ in choice.slices]
        return whole + parts + [Claim(parent.uuid, shared=True) for _, parent in choice.slices]

    def _lease_unseen(self) -> None:
        """Where the driver is not asked, only what is named by a whole UUID can be leased."""
        gpus = self._context.config.gpus
        claims = [Claim(each, self._context.config.gpus_shared) for each in gpus if NAME.fullmatch(each)] if isinstance(gpus, tuple) else []
        self._leases = leases.take(self._context.paths, claims, self._context.instance)

    def _gate(self, seen: Seen) -> VllmdError | None:
        config = self._context.config
        count = self._need.count if config.gpus == "all" else None
        short = gpu_choice.shortages(self._choice, seen.devices, self._rules(), count or 0)
        if not short:
            ours = {each.index for each in self._choice.devices}
            self._before = tuple(each for each in seen.devices if each.index in ours)
            return None
        if isinstance(config.gpus, int):  # another one may be free by then
            self.release()
        hint = "End what uses it, or lower serve.gpu_memory_utilization; `vllmctl gpu` shows who has what. preflight.gpu_min_free: 0 lifts this gate."
        return TryLater("gpu_memory_taken", short, hint)

    def _error(self, refusal: Refusal) -> VllmdError:
        error = (TryLater if refusal.may_pass else GpuUnavailable)(refusal.code, refusal.what, refusal.hint)
        if not refusal.may_pass:
            raise error
        return error

    def _as_chosen(self) -> Context:
        """By UUID; AMD's runtime takes indices alone."""
        config, choice = self._context.config, self._choice
        if config.gpus == "all" or not choice.tokens:
            return self._context
        tokens = tuple(str(each.index) for each in choice.whole) if self._source == "sysfs" else choice.tokens
        return replace(self._context, config=replace(config, gpus=tokens))

    # -- after the end

    async def returned(self) -> TryLater | None:
        """Waits until the memory is as it was before the spawn; what is missing, and who has it. Where others share the GPUs
        nobody can tell whose memory it is."""
        before, self._before = self._before, ()
        if not before or self._context.config.gpus_shared:
            return None
        bound_s = self._context.config.stop.gpu_release_timeout_s
        end = time.monotonic() + bound_s
        while True:
            try:
                seen = await self._look()
            except GpuUnavailable as error:
                return TryLater(error.code, error.what, error.hint)
            missing = gpu_choice.not_returned(before, seen.devices)
            if not missing:
                return None
            if time.monotonic() >= end:
                hint = "`nvidia-smi` shows who holds it; a process in state D in the driver goes only with a reboot."
                return TryLater("gpu_memory_not_back", f"{bound_s:g} s after the engine's end {missing}", hint)
            await asyncio.sleep(min(POLL_S, max(0.0, end - time.monotonic())))

    def _banned(self) -> Mapping[str, Banned]:
        found = quarantine.read(self._context.paths)
        return {uuid: Banned(f"{record.what}, since {_moment(record.first_at)}", record.hint or HINTS[record.cls]) for uuid, record in found.items()}

    def release(self) -> None:
        self._leases.release()
        self._choice, self._claimed = Choice(), []


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M}" if at else "an unknown time"
