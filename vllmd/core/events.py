"""What can happen to an instance (past tense) and what is then to be done (imperative): the vocabulary of core/lifecycle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an instance ends: VllmdError as a value. `status` is the exit status of `vllmd run`."""

    code: str
    what: str
    hint: str
    status: int


# Events


@dataclass(frozen=True, slots=True)
class Begun:
    """The supervisor is up. `selected` says whether the configuration names a model."""

    selected: bool


@dataclass(frozen=True, slots=True)
class PreflightPassed:
    pass


@dataclass(frozen=True, slots=True)
class ModelResolved:
    """A valid model was found; its bytes may still be being verified."""


@dataclass(frozen=True, slots=True)
class ModelVerified:
    pass


@dataclass(frozen=True, slots=True)
class EngineSpawned:
    pass


@dataclass(frozen=True, slots=True)
class ProofPassed:
    """The engine answered its task's proof of life, from a listener of its own."""


@dataclass(frozen=True, slots=True)
class StageFailed:
    """Preflight, resolution, verification, spawn or proof ended with a failure."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class EngineExited:
    """The engine's main process is gone; never a success unless a stop was asked for (vLLM exits 0 when it crashed)."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class VerdictReached:
    """The watch has decided that the engine is dead, hung or sick."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class StartExpired:
    """No progress for too long, or the start's own deadline."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Paused:
    """A person works on the instance: nothing ends it but a stop."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The person is done, or the pause's time is over."""


@dataclass(frozen=True, slots=True)
class EvidenceGathered:
    """What the failure left is written down. `failure`: the same one, its cause named from the evidence."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class StopRequested:
    """By a signal, or by the group that the instance is part of (several hosts serving one model)."""

    by: Literal["signal", "group"]


@dataclass(frozen=True, slots=True)
class ReloadRequested:
    pass


@dataclass(frozen=True, slots=True)
class DrainExpired:
    pass


@dataclass(frozen=True, slots=True)
class TreeEmptied:
    """Nothing that this instance started is left."""


@dataclass(frozen=True, slots=True)
class KillExpired:
    """Killed processes are still there: unkillable (in D state, as a rule)."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Faulted:
    """A bug of ours: an exception that nobody expected, or an event that cannot be."""

    failure: Failure


Event = (
    Begun
    | PreflightPassed
    | ModelResolved
    | ModelVerified
    | EngineSpawned
    | ProofPassed
    | StageFailed
    | EngineExited
    | VerdictReached
    | StartExpired
    | Paused
    | Resumed
    | EvidenceGathered
    | StopRequested
    | ReloadRequested
    | DrainExpired
    | TreeEmptied
    | KillExpired
    | Faulted
)

EVENTS: tuple[type, ...] = Event.__args__


# Effects


@dataclass(frozen=True, slots=True)
class RunPreflight:
    pass


@dataclass(frozen=True, slots=True)
class ResolveModel:
    pass


@dataclass(frozen=True, slots=True)
class LaunchEngine:
    pass


@dataclass(frozen=True, slots=True)
class ProbeStart:
    """Ask until the engine answers; start the clocks of the start."""


@dataclass(frozen=True, slots=True)
class TellReady:
    """READY=1."""


@dataclass(frozen=True, slots=True)
class WatchEngine:
    pass


@dataclass(frozen=True, slots=True)
class TellStopping:
    """STOPPING=1, which also disarms systemd's watchdog."""


@dataclass(frozen=True, slots=True)
class TerminateEngine:
    """SIGTERM to the engine's main process. `during_start`: vLLM loses it then, so the grace is short."""

    during_start: bool


@dataclass(frozen=True, slots=True)
class GatherEvidence:
    """Look at what is about to be killed, within seconds; EvidenceGathered when done, whatever was found."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class KillTree:
    """End every stage in flight and every process of the launch; arms the kill's deadline; TreeEmptied when done."""


@dataclass(frozen=True, slots=True)
class RecordFailure:
    """Journal and last.json: the first failure of an instance, before anything is torn down."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class ReloadConfiguration:
    pass


@dataclass(frozen=True, slots=True)
class Finish:
    """Leave, with this exit status."""

    status: int


Effect = (
    RunPreflight
    | ResolveModel
    | LaunchEngine
    | ProbeStart
    | TellReady
    | WatchEngine
    | TellStopping
    | TerminateEngine
    | GatherEvidence
    | KillTree
    | RecordFailure
    | ReloadConfiguration
    | Finish
)
