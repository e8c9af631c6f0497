"""What an engine plug-in supplies. Nothing outside engines/ knows vLLM; a plug-in fits on two screens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vllmd.config.paths import Paths
from vllmd.config.settings import Config
from vllmd.core.plan import Command, Endpoint, Installed
from vllmd.errors import ConfigError

if TYPE_CHECKING:  # only the watch needs them: 20 ms of every command otherwise
    from vllmd.core.faults import Signs
    from vllmd.core.pulse import Outcome, Rank
    from vllmd.core.sizing import Wanted

GUARD_FILE = "guard.json"
"""In the instance's runtime directory: the sums of the keys that hold now, for the engine (Access.guard_file)."""


class SettingRefused(ConfigError):
    """A setting that the engine cannot take. `key` is its dotted key (`engine.args.foo`), so that whoever knows the
    layers can say in which file and line it stands; `reason` is the rest of the sentence."""

    def __init__(self, code: str, key: str, reason: str, hint: str = "") -> None:
        super().__init__(code, f"{key}: {reason}", hint)
        self.key = key
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask the engine. All empty: nobody watches over keys (`vllmd serve`), and the engine is told those that are given.

    `guard_file` is what engines/guard reads, kept by the supervisor while the engine runs; `internal_key` is the supervisor's own, for
    this launch; `client_keys` are those of the moment, for an engine that cannot be guarded that way."""

    guard_file: str = ""
    internal_key: str = ""
    client_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Context:
    """What a plug-in decides from: parsed configuration, places, the instance's name, and the supervisor's environment."""

    config: Config
    paths: Paths
    instance: str
    installed: Installed
    environ: Mapping[str, str]
    access: Access = Access()


@dataclass(frozen=True, slots=True)
class ProofRequest:
    """One request of the proof of life. `accept` gets the decoded JSON body of a 200 answer (or the raw text where it is
    not JSON), and returns '' when it proves life, else what is wrong with it."""

    method: str
    path: str
    body: Any
    accept: Callable[[Any], str]
    headers: Mapping[str, str]
    describe: str
    """For people: 'one token by /v1/completions'."""


@dataclass(frozen=True, slots=True)
class LogFact:
    """What one line of the engine's output says. `phase` '' means no new phase; `fraction` 0..1 where a percentage is shown."""

    priority: int
    phase: str = ""
    fraction: float | None = None


class Engine(Protocol):
    """The plug-in. Stateless: everything it needs stands in the Context."""

    name: str
    tuning: type[Any]
    """Frozen dataclass of its own settings rows (config.settings.setting), which users write under `serve:`."""
    health_path: str
    phases: Sequence[str]
    """Names of the phases of a start, in order, for progress bars and the timeline."""
    artifact: str
    """The kind of model it wants ('huggingface'); models/validate has the validator of that kind."""

    def installed(self, config: Config, paths: Paths, environ: Mapping[str, str]) -> Installed:
        """Which program would run, and what is known of it; runs nothing. ConfigError when there is none."""

    def check(self, context: Context) -> list[str]:
        """ConfigError on flags it does not know or that vllmd owns, on wrong GPU counts; returns warnings."""

    def endpoints(self, context: Context) -> tuple[Endpoint, ...]:
        """Where it will answer; the first is probed."""

    def command(self, context: Context, model: str) -> Command:
        """What to execute for the model in this directory (or core.plan.MODEL_PLACEHOLDER)."""

    def task(self, context: Context, model: Path) -> str:
        """generate, embed, score, transcribe, joined or none; reads the model's config.json where the task is auto."""

    def proofs(self, context: Context, task: str) -> tuple[ProofRequest, ...]:
        """The requests that prove life for the task; () where /health is all that can be asked. Tried in order; the
        first whose route exists (not 404) decides."""

    def example(self, context: Context, model: Path) -> tuple[str, Any] | None:
        """Path and JSON body of a request that a person would try first; None where there is none."""

    def memory_fraction(self, context: Context) -> float:
        """Share of each GPU's memory that it will ask for (0 where it does not say)."""

    def read_line(self, line: str) -> LogFact:
        """Level, phase and progress of one line of output; never raises."""


@runtime_checkable
class Preparing(Protocol):
    """An engine that may want to be given another directory than the model's own."""

    def prepare(self, context: Context, directory: Path) -> tuple[Path, str]:
        """The directory to serve (the model's own, or one of links to it below paths.cache), and a sentence for the
        journal ('' where there is nothing to say). Called in a thread right before the launch. ModelInvalid where it cannot
        be served; OSError."""


@runtime_checkable
class Holding(Protocol):
    """An engine that runs from directories which must stay while it runs, and writes into some."""

    def holds(self, context: Context) -> tuple[Path, ...]:
        """Those that are locked (shared) from right before the launch to the end: its own, its caches. They are there once
        `prepare` was called."""


@runtime_checkable
class Guarding(Protocol):
    """An engine that can want a key."""

    def guards(self, context: Context) -> bool:
        """Whether engines/guard stands before all of its paths, so that a change of the keys needs no restart."""

    def headers(self, context: Context) -> Mapping[str, str]:
        """What the supervisor's own requests carry; {} where no key is wanted."""


@runtime_checkable
class Counting(Protocol):
    """An engine that knows how many GPUs it will use of those that it sees."""

    def devices(self, context: Context) -> int | None:
        """On this host; 0 for an engine that was built for none, None where it cannot be told."""


@runtime_checkable
class Sizing(Protocol):
    """An engine whose need of memory can be told before it is started."""

    def sizing(self, context: Context) -> Wanted:
        """What of the settings decides it."""


class Reading(Protocol):
    """One reading of an engine's heartbeat, fed with the body of the answer as it comes. Never raises."""

    def feed(self, data: bytes) -> None: ...

    def result(self) -> tuple[Outcome, Mapping[str, Rank]]:
        """`ok` with the figures of each rank, or `absent`, `sleeping`, `invalid`."""


@runtime_checkable
class Beating(Protocol):
    """An engine whose progress can be read without asking it for work. One that is not Beating is watched by /health, and
    by proofs of life alone."""

    heartbeat_path: str
    heartbeat_limit_bytes: int
    excuses: Sequence[str]
    """Paths that are asked before an engine is called hung: a 200 whose JSON says true somewhere (`{"is_paused": true}`) means that somebody
    has told it to stand still. An engine that does not know them says 404."""

    def heartbeat(self) -> Reading:
        """For one answer of `heartbeat_path`."""

    def addressed(self, request: ProofRequest, rank: str) -> ProofRequest:
        """The same request for that rank alone, where the engine can be told; else as it is."""


@runtime_checkable
class Diagnosing(Protocol):
    """An engine whose own words tell why it failed."""

    @property
    def signs(self) -> Signs: ...

    def compile_caches(self, context: Context) -> tuple[Path, ...]:
        """Directories of compiled code below paths.cache, which it makes again when they are gone."""
