"""The life of an instance as a table: (state, event) -> (state, effects). Decides; does nothing.

Every pair of a state and an event stands here on purpose, in TABLE (handled), in IGNORED (may happen, means nothing
then), or nowhere (a bug of ours: `step` raises Impossible). docs/ARCHITECTURE.md shows the graph made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from vllmd.core import events as ev
from vllmd.core.events import Effect, Event, Failure


class State(StrEnum):
    CREATED = "created"
    UNCONFIGURED = "unconfigured"
    CHECKING = "checking"
    RESOLVING = "resolving"
    LAUNCHING = "launching"
    STARTING = "starting"
    PROVEN = "proven"
    READY = "ready"
    DRAINING = "draining"
    EXAMINING = "examining"
    KILLING = "killing"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Life:
    """Where an instance is. `verified`: the model's bytes are; `failure`: why it ends, the first one; no later one
    replaces it, only the evidence names its cause. `paused`: a person works on it; `pending`: what happened to the engine
    meanwhile, and is acted upon when the pause ends."""

    state: State = State.CREATED
    verified: bool = False
    failure: Failure | None = None
    paused: bool = False
    pending: Failure | None = None


NO_RESTART = frozenset({2, 3, 64, 65, 69, 77, 78})
"""Statuses after which a person must act first: RestartPreventExitStatus= of the unit."""


class Impossible(Exception):
    """An event that cannot happen in this state happened: a bug of ours."""


Outcome = tuple[Life, tuple[Effect, ...]]
Rule = Callable[[Life, Any], Outcome]


def _to(state: State, *effects: Effect) -> Rule:
    return lambda life, _event: (replace(life, state=state), effects)


def _begin(life: Life, event: ev.Begun) -> Outcome:
    if event.selected:
        return replace(life, state=State.CHECKING), (ev.RunPreflight(),)
    return replace(life, state=State.UNCONFIGURED), (ev.TellReady(),)


def _verified(life: Life, _event: ev.ModelVerified) -> Outcome:
    return replace(life, verified=True), ()


def _proven(life: Life, _event: ev.ProofPassed) -> Outcome:
    if not life.verified:
        return replace(life, state=State.PROVEN), ()
    return _ready(life)


def _verified_last(life: Life, _event: ev.ModelVerified) -> Outcome:
    return _ready(replace(life, verified=True))


def _ready(life: Life) -> Outcome:
    return replace(life, state=State.READY), (ev.TellReady(), ev.WatchEngine())


def _fail(life: Life, event: ev.StageFailed | ev.EngineExited | ev.VerdictReached | ev.StartExpired | ev.Faulted) -> Outcome:
    # STOPPING=1 first: it disarms systemd's watchdog, so that a long teardown keeps its own exit status.
    failed = replace(life, state=State.KILLING, failure=event.failure)
    return failed, (ev.TellStopping(), ev.RecordFailure(event.failure), ev.KillTree())


def _examine(life: Life, event: ev.StageFailed | ev.EngineExited | ev.VerdictReached | ev.StartExpired) -> Outcome:
    # Whoever kills first has nothing left to look at: a hung process has its stacks only while it lives.
    examined = replace(life, state=State.EXAMINING, failure=event.failure)
    return examined, (ev.TellStopping(), ev.GatherEvidence(event.failure))


def _happened(life: Life, event: ev.StageFailed | ev.EngineExited | ev.StartExpired) -> Outcome:
    """It will not happen again, so a pause does not lose it."""
    if life.paused:
        return replace(life, pending=life.pending or event.failure), ()
    return _examine(life, event)


def _judged(life: Life, event: ev.VerdictReached) -> Outcome:
    """What still holds after a pause is found again."""
    return (life, ()) if life.paused else _examine(life, event)


def _paused(life: Life, _event: ev.Paused) -> Outcome:
    return replace(life, paused=True), ()


def _resumed(life: Life, _event: ev.Resumed) -> Outcome:
    resumed = replace(life, paused=False, pending=None)
    return (resumed, ()) if life.pending is None else _examine(resumed, ev.EngineExited(life.pending))


def _examined(life: Life, event: ev.EvidenceGathered) -> Outcome:
    return replace(life, state=State.KILLING, failure=event.failure), (ev.RecordFailure(event.failure), ev.KillTree())


def _unexamined(life: Life, event: ev.StopRequested | ev.Faulted) -> Outcome:
    """Nobody waits for the evidence any more; what failed first stays the reason."""
    failure = life.failure or ev.Failure("bug", f"{type(event).__name__} while nothing had failed", "", 70)
    return replace(life, state=State.KILLING, failure=failure), (ev.RecordFailure(failure), ev.KillTree())


def _end(life: Life, _event: ev.TreeEmptied) -> Outcome:
    return replace(life, state=State.STOPPED), (ev.Finish(life.failure.status if life.failure else 0),)


def _unkillable(life: Life, event: ev.KillExpired) -> Outcome:
    # The first failure stays the reason; the exit says that something of it is left, unless that would allow a restart
    # that the reason forbids (a lost GPU gives no memory back either).
    first = life.failure
    status = first.status if first is not None and first.status in NO_RESTART else event.failure.status
    effects: tuple[Effect, ...] = (ev.Finish(status),)
    if life.failure is None:
        effects = (ev.RecordFailure(event.failure), *effects)
    return replace(life, state=State.STOPPED, failure=life.failure or event.failure), effects


_KILL = _to(State.KILLING, ev.KillTree())
_ABANDON = _to(State.KILLING, ev.TellStopping(), ev.KillTree())


def _drain(*, during_start: bool) -> Rule:
    """What has failed during a pause answers nobody any more: its end is past, and a drain would wait for it in vain."""
    drained = _to(State.DRAINING, ev.TellStopping(), ev.TerminateEngine(during_start=during_start))
    return lambda life, event: (drained if life.pending is None else _ABANDON)(life, event)


_DRAIN_START, _DRAIN = _drain(during_start=True), _drain(during_start=False)


def _reload(life: Life, _event: ev.ReloadRequested) -> Outcome:
    return life, (ev.ReloadConfiguration(),)


S = State
TABLE: dict[tuple[State, type], Rule] = {
    (S.CREATED, ev.Begun): _begin,
    (S.CREATED, ev.StopRequested): _ABANDON,
    #
    (S.UNCONFIGURED, ev.StopRequested): _ABANDON,
    (S.UNCONFIGURED, ev.ReloadRequested): _reload,
    #
    (S.CHECKING, ev.PreflightPassed): _to(S.RESOLVING, ev.ResolveModel()),
    (S.CHECKING, ev.StageFailed): _fail,
    (S.CHECKING, ev.StopRequested): _ABANDON,
    (S.CHECKING, ev.ReloadRequested): _reload,
    #
    (S.RESOLVING, ev.ModelResolved): _to(S.LAUNCHING, ev.LaunchEngine()),
    (S.RESOLVING, ev.StageFailed): _fail,
    (S.RESOLVING, ev.StopRequested): _ABANDON,
    (S.RESOLVING, ev.ReloadRequested): _reload,
    #
    (S.LAUNCHING, ev.EngineSpawned): _to(S.STARTING, ev.ProbeStart()),
    (S.LAUNCHING, ev.ModelVerified): _verified,
    (S.LAUNCHING, ev.StageFailed): _fail,
    (S.LAUNCHING, ev.EngineExited): _fail,
    (S.LAUNCHING, ev.StopRequested): _ABANDON,
    (S.LAUNCHING, ev.ReloadRequested): _reload,
    #
    (S.STARTING, ev.ModelVerified): _verified,
    (S.STARTING, ev.ProofPassed): _proven,
    (S.STARTING, ev.StageFailed): _happened,
    (S.STARTING, ev.EngineExited): _happened,
    (S.STARTING, ev.StartExpired): _happened,
    (S.STARTING, ev.StopRequested): _DRAIN_START,
    (S.STARTING, ev.ReloadRequested): _reload,
    #
    (S.PROVEN, ev.ModelVerified): _verified_last,
    (S.PROVEN, ev.StageFailed): _happened,
    (S.PROVEN, ev.EngineExited): _happened,
    (S.PROVEN, ev.StartExpired): _happened,
    (S.PROVEN, ev.StopRequested): _DRAIN,
    (S.PROVEN, ev.ReloadRequested): _reload,
    #
    (S.READY, ev.EngineExited): _happened,
    (S.READY, ev.VerdictReached): _judged,
    (S.READY, ev.StopRequested): _DRAIN,
    (S.READY, ev.ReloadRequested): _reload,
    #
    (S.DRAINING, ev.EngineExited): _KILL,
    (S.DRAINING, ev.DrainExpired): _KILL,
    #
    (S.EXAMINING, ev.EvidenceGathered): _examined,
    (S.EXAMINING, ev.StopRequested): _unexamined,
    (S.EXAMINING, ev.Faulted): _unexamined,
    #
    (S.KILLING, ev.TreeEmptied): _end,
    (S.KILLING, ev.KillExpired): _unkillable,
    # A stop can overtake a spawn that is under way: what has appeared since the kill is killed too.
    (S.KILLING, ev.EngineSpawned): _KILL,
    #
    **{(state, ev.Paused): _paused for state in (S.STARTING, S.PROVEN, S.READY)},
    **{(state, ev.Resumed): _resumed for state in (S.STARTING, S.PROVEN, S.READY)},
    #
    **{(state, ev.Faulted): _fail for state in State if state not in {S.EXAMINING, S.KILLING, S.STOPPED}},
}

_LATE = (ev.PreflightPassed, ev.ModelResolved, ev.ModelVerified, ev.EngineSpawned, ev.ProofPassed, ev.StageFailed,
         ev.EngineExited, ev.VerdictReached, ev.StartExpired, ev.Paused, ev.Resumed, ev.StopRequested, ev.ReloadRequested, ev.DrainExpired, ev.Faulted)  # fmt: skip
"""Events that were on their way when the instance began to end: they come late and change nothing."""

IGNORED: frozenset[tuple[State, type]] = frozenset(
    {
        (S.CREATED, ev.ReloadRequested),
        # Timers and answers that were queued when the state moved on.
        (S.READY, ev.StartExpired),
        (S.READY, ev.ProofPassed),
        (S.PROVEN, ev.ProofPassed),
        *((S.DRAINING, late) for late in _LATE if (S.DRAINING, late) not in TABLE),
        *((S.EXAMINING, late) for late in _LATE if (S.EXAMINING, late) not in TABLE),
        (S.KILLING, ev.EvidenceGathered),
        (S.STOPPED, ev.EvidenceGathered),
        *((S.KILLING, late) for late in _LATE if (S.KILLING, late) not in TABLE),
        *((S.STOPPED, late) for late in (*_LATE, ev.TreeEmptied, ev.KillExpired)),
    }
)


def classify(state: State, event: type) -> str:
    """'handled', 'ignored' or 'bug': what the matrix in the tests prints."""
    if (state, event) in TABLE:
        return "handled"
    return "ignored" if (state, event) in IGNORED else "bug"


def step(life: Life, event: Event) -> Outcome:
    """The next life, and what is to be done. Raises Impossible on a pair that is a bug of ours."""
    key = (life.state, type(event))
    rule = TABLE.get(key)
    if rule is not None:
        return rule(life, event)
    if key in IGNORED:
        return life, ()
    raise Impossible(f"{type(event).__name__} in state {life.state}")
