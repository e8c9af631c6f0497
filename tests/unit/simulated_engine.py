"""An engine, its load and its host as functions of time, and the watch's loop over them without a clock: for a month in seconds.

The loop is instance/watching's: the same calls of core/liveness in the same order, with the readings that such an engine
would have given. What the load does is drawn from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from random import Random

from vllmd.core.liveness import Finding, Limits, Liveness, Reply
from vllmd.core.pulse import Canary, Outcome, Rank, Sample

INTERVAL_S, HEARTBEAT_S, TIMEOUT_S = 5.0, 1.0, 5.0
CANARY_TIMEOUT_S = 60.0
LIMITS = Limits(hang_s=60, first_s=300, silent_s=600, canary_interval_s=300, failures=3)
NEVER = math.inf


@dataclass(frozen=True)
class Burst:
    """Work from `start` to `end`: `prefill_s` in chunks of `chunk_s` that yield nothing, then a step each `step_s`; or, without
    a heartbeat that moves at all meanwhile, one step as long as `first_s`."""

    start: float
    end: float
    requests: int
    step_s: float
    prefill_s: float = 0.0
    chunk_s: float = 1.0
    first_s: float = 0.0

    def steps(self, at: float) -> int:
        done = min(at, self.end) - self.start - self.prefill_s - self.first_s
        return max(0, int(done / self.step_s))

    def cached(self, at: float) -> float:
        """The share of the KV cache grows with each chunk, and with each token."""
        return 1 + int(min(at - self.start, self.prefill_s) / self.chunk_s) + self.steps(at)


@dataclass(frozen=True)
class Span:
    """A time in which the server answers nobody; `cores` that it uses then."""

    start: float
    end: float
    cores: float = 1.0


@dataclass
class World:
    """`bursts` of each rank, and `blocks` of the server, in order of time. `hang_at`: a rank stands still from then on. `resets`:
    counters begin anew. `suspends`: (monotonic time, how long the machine sleeps). `stops`: (time, how long we are stopped)."""

    bursts: Sequence[Sequence[Burst]]
    blocks: Sequence[Span] = ()
    hang_at: Sequence[float] = ()
    resets: Sequence[float] = ()
    suspends: Sequence[tuple[float, float]] = ()
    stops: Sequence[tuple[float, float]] = ()
    latency_s: tuple[float, float] = (0.004, 0.03)
    asleep: Sequence[Span] = ()
    _next: list[int] = field(default_factory=list)
    _done: list[list[int]] = field(default_factory=list)
    _block: int = 0
    _cpu_s: float = 0.0
    _base: list[int] = field(default_factory=list)
    _resets: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._base, self._resets = [0] * len(self.bursts), sorted(self.resets)
        self._next = [0] * len(self.bursts)
        self._done = [[0, 0] for _ in self.bursts]
        self.hang_at = self.hang_at or [NEVER] * len(self.bursts)

    def rank(self, index: int, at: float) -> Rank:
        """Called with times that only grow."""
        at = min(at, self.hang_at[index])
        bursts, done = self.bursts[index], self._done[index]
        while self._next[index] < len(bursts) and bursts[self._next[index]].end <= at:
            burst = bursts[self._next[index]]
            done[0] += burst.steps(burst.end)
            done[1] += burst.requests
            self._next[index] += 1
        if self._resets and self._resets[0] <= at:
            reset = self._resets.pop(0)
            self._base = [-sum(burst.steps(reset) for burst in each if burst.start < reset) for each in self.bursts]
        base = self._base[index]
        if self._next[index] < len(bursts) and bursts[self._next[index]].start <= at:
            burst = bursts[self._next[index]]
            running = min(256, burst.requests)
            steps = burst.steps(at)
            return Rank(max(0, done[0] + steps + base), running, burst.requests - running, done[1], (burst.cached(at) if at - burst.start >= burst.first_s else 0.0,))
        return Rank(max(0, done[0] + base), 0, 0, done[1], (0.0,))

    def is_idle(self, index: int, at: float) -> bool:
        return not self.rank(index, at).has_work

    def block(self, at: float) -> Span | None:
        while self._block < len(self.blocks) and self.blocks[self._block].end <= at:
            gone = self.blocks[self._block]
            self._cpu_s += (gone.end - gone.start) * gone.cores
            self._block += 1
        if self._block < len(self.blocks) and self.blocks[self._block].start <= at:
            return self.blocks[self._block]
        return None

    def cpu_s(self, at: float) -> float:
        now = self.block(at)
        return self._cpu_s + ((at - now.start) * now.cores if now else 0.0)

    def busy_until(self, index: int, at: float) -> float:
        """When a request that comes in now is answered."""
        answered = at + 0.2
        for burst in islice(self.bursts[index], self._next[index], self._next[index] + 3):
            if burst.start <= answered < burst.end:  # also what comes in right after it, and is served first
                answered = min(burst.end, max(at, burst.start) + burst.prefill_s + burst.first_s + 10 * burst.step_s * max(1, burst.requests / 256))
        for each in islice(self.blocks, self._block, self._block + 3):
            if each.start <= answered < each.end:
                answered = each.end
        return answered


class Simulation:
    """`findings` are (monotonic time, verdict); `canaries` counts the proofs of life that were sent."""

    def __init__(self, world: World, seed: int = 0, limits: Limits = LIMITS) -> None:
        self.world = world
        self.now = self.slept = 0.0
        self.liveness = Liveness(limits, 0.0, 0.0)
        self.findings: list[tuple[float, Finding]] = []
        self.canaries = self.busy_canaries = self.gaps = self.readings = 0
        self._random = Random(seed)
        self._replies: list[tuple[float, str, Canary, Reply]] = []
        self._interruptions = sorted([(at, for_s, True) for at, for_s in world.suspends] + [(at, for_s, False) for at, for_s in world.stops])

    def run(self, until: float) -> list[tuple[float, Finding]]:
        planned = 0.0
        while self.now < until:
            if not self._look(planned):
                timeout = self.liveness.timeout_s(TIMEOUT_S, self.now)
                sample = self._read(timeout)
                if not self._look(timeout):
                    self._take(sample)
            planned = self.liveness.pause_s(INTERVAL_S, HEARTBEAT_S, self.now)
            self._sleep(planned)
        return self.findings

    def _look(self, planned: float) -> bool:
        reason = self.liveness.look(self.now, self.now + self.slept, planned)
        self.gaps += bool(reason)
        return bool(reason)

    def _pass(self, seconds: float) -> None:
        """Time goes by, with whatever interrupts it."""
        end = self.now + seconds
        while self._interruptions and self._interruptions[0][0] <= end:
            _, for_s, suspended = self._interruptions.pop(0)
            if suspended:
                self.slept += for_s
            else:
                end += for_s
        self.now = end

    def _sleep(self, seconds: float) -> None:
        """Cut short by the reply to a proof of life."""
        due = min((at for at, *_ in self._replies), default=NEVER)
        self._pass(max(0.0, min(seconds, due - self.now)))
        for reply in [each for each in self._replies if each[0] <= self.now]:
            self._replies.remove(reply)
            _, name, canary, kind = reply
            self._found(self.liveness.replied(name, canary, kind, self.now, detail="status 500"))

    def _read(self, timeout: float) -> Sample:
        asked = self.now
        latency = self._random.uniform(*self.world.latency_s)
        block = self.world.block(asked)
        if block is not None:
            latency += block.end - asked
        if latency >= timeout:
            self._pass(timeout)
            return Sample(asked, self.now, "timeout", {}, self.world.cpu_s(self.now))
        self._pass(latency)
        self.readings += 1
        outcome: Outcome = "sleeping" if any(each.start <= asked < each.end for each in self.world.asleep) else "ok"
        # What a server shows right after it stood still is as old as that.
        seen = block.start if block is not None else self.now
        ranks = {str(index): self.world.rank(index, seen) for index in range(len(self.world.bursts))}
        return Sample(asked, self.now, outcome, ranks if outcome == "ok" else {})

    def _take(self, sample: Sample) -> None:
        self._found(self.liveness.scraped(sample))
        for name in self.liveness.due(self.now):
            self._send(name)

    def _send(self, name: str) -> None:
        canary, index = self.liveness.asked(name, self.now), int(name)
        self.canaries += 1
        self.busy_canaries += not self.world.is_idle(index, self.now)
        answered = self.world.busy_until(index, self.now)
        if answered > self.world.hang_at[index] or answered - self.now > CANARY_TIMEOUT_S:
            self._replies.append((self.now + CANARY_TIMEOUT_S, name, canary, "timeout"))
        else:
            self._replies.append((answered, name, canary, "ok"))

    def _found(self, finding: Finding | None) -> None:
        if finding is not None:
            self.findings.append((self.now, finding))


# Loads.


def gaps(random: Random, mean_s: float, until: float) -> Iterator[float]:
    at = random.expovariate(1 / mean_s)
    while at < until:
        yield at
        at += random.expovariate(1 / mean_s)


def load(random: Random, until: float, *, mean_gap_s: float, nights: bool = True) -> list[Burst]:
    """What a month brings: chats, batches of 1,280 requests, prompts of ten minutes, steps of 45 s, and quiet nights."""
    found: list[Burst] = []
    for at in gaps(random, mean_gap_s, until):
        start = max(at, found[-1].end + 0.5 if found else 0.0)
        if nights and (start % 86400) / 3600 < 7 and random.random() < 0.95:
            continue
        found.append(_burst(random, start))
    assert all(a.end < b.start for a, b in pairwise(found))
    return found


def _burst(random: Random, start: float) -> Burst:
    kind = random.random()
    if kind < 0.90:
        return Burst(start, start + random.uniform(0.5, 20), random.randint(1, 8), 0.03)
    if kind < 0.94:
        return Burst(start, start + random.uniform(60, 300), 1280, random.uniform(0.1, 0.8))
    if kind < 0.97:
        prefill = random.uniform(30, 600)
        return Burst(start, start + prefill + 20, 1, 0.05, prefill_s=prefill, chunk_s=random.uniform(0.2, 20))
    return Burst(start, start + random.uniform(100, 300), 2, random.uniform(10, 45))


def blocks_of(random: Random, until: float, mean_gap_s: float) -> list[Span]:
    """The server's event loop stands still, mostly for a moment: tokenization, a burst of connections, garbage."""
    found: list[Span] = []
    for at in gaps(random, mean_gap_s, until):
        if not found or at > found[-1].end + 1:
            found.append(Span(at, at + random.choice([2, 4, 6, 12, 50, 200]), random.uniform(0.5, 1.5)))
    return found
