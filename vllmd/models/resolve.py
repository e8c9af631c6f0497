"""The resolve stage: asks each source in turn, validates what it has, and takes the first model that is whole.

Until a network source has to deliver, it only reads (what a crash of the existing tools left is put back first), so it goes
on where the store cannot be written. Models that are offered over a network are brought by models/obtain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest, ResolvedModel
from vllmd.errors import (
    ConfigError,
    ModelInvalid,
    ModelNotFound,
    PermissionMissing,
    SourceUnavailable,
    StorageFailed,
    TryLater,
    VllmdError,
)
from vllmd.models import sources, store
from vllmd.models.identity import hash12
from vllmd.models.ioerrors import explained, translated
from vllmd.models.lock import locked
from vllmd.models.places import is_directory
from vllmd.models.progress import Progress
from vllmd.models.published import manifest_of
from vllmd.models.sources import Candidate, Context, Found, NotFound, Offered
from vllmd.models.validate import checks_of, validate

Report = Callable[[Progress], None]
NONE_REJECTED: Mapping[Path, VllmdError] = MappingProxyType({})
_GRAVEST = (ModelInvalid, PermissionMissing, StorageFailed)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one source. `status` is 'OK', 'not found', 'skipped' or 'failed'; `error` only where it failed."""

    source: str
    status: str
    reason: str = ""
    error: VllmdError | None = None
    model: ResolvedModel | None = None

    def __str__(self) -> str:
        return f"{self.status} ({self.reason})" if self.reason else self.status


def resolve(
    request: ModelRequest, settings: Model, environ: Mapping[str, str], report: Report, rejected: Mapping[Path, VllmdError] = NONE_REJECTED
) -> ResolvedModel:
    """The model, by the first source that has it whole. `rejected` are directories that turned out wrong afterwards.

    ModelInvalid (65) where a source has it damaged and no other has it; PermissionMissing (77), StorageFailed (74) where one
    cannot be read; else ModelNotFound (66) with every source's reason. TryLater (75) where the lock is held too long.
    """
    return _model(request, search(request, settings, environ, report, rejected), report)


def resolve_patiently(request: ModelRequest, settings: Model, environ: Mapping[str, str], report: Report) -> ResolvedModel:
    """`resolve`, asking again while a source cannot be reached: waiting is not restarting, and an outage of a network must not
    use up an instance's starts. The time allowed runs only while nothing arrives."""
    from vllmd.models.patience import Patience  # for those that may wait

    patience = Patience(settings.source_retry_s, settings.source_timeout_s)

    def watched(progress: Progress) -> None:
        patience.saw(progress)
        report(progress)

    while True:
        outcomes = search(request, settings, environ, watched)
        unavailable = [outcome for outcome in outcomes if isinstance(outcome.error, SourceUnavailable)]
        if outcomes[-1].model or not unavailable or patience.is_over():
            return _model(request, outcomes, report)
        patience.wait(unavailable[0].reason, watched)


def _model(request: ModelRequest, outcomes: list[Outcome], report: Report) -> ResolvedModel:
    model = outcomes[-1].model if outcomes else None
    if model is None:
        raise _failure(request, outcomes)
    report(Progress("resolve", model.via, text=f"Resolved: {model.identity} (via {model.via})"))
    return model


def search(
    request: ModelRequest, settings: Model, environ: Mapping[str, str], report: Report, rejected: Mapping[Path, VllmdError] = NONE_REJECTED
) -> list[Outcome]:
    """One outcome for each source that was asked; the last has the model, if any has it."""
    outcomes: list[Outcome] = []
    with _lock(request, settings, report) as hold:
        asking = _Asking(request, Context(settings, environ), report, rejected, hold)
        for name in ("local",) if request.path else request.sources:
            outcome = _ask(name, asking)
            outcomes.append(outcome)
            if outcome.model:
                break
    return outcomes


@dataclass(frozen=True, slots=True)
class _Hold:
    """Whether the identity is ours. `say` is for those who wait for it; `problem` is why it is not, None if it is."""

    say: Callable[[str], None] = lambda _text: None
    problem: VllmdError | None = None


@contextmanager
def _lock(request: ModelRequest, settings: Model, report: Report) -> Iterator[_Hold]:
    """The identity's lock, and under it the recovery. Without it where the store cannot be written: then nobody changes it;
    nor for a directory outside the store, which nobody of us changes."""
    with ExitStack() as stack:
        yield _taken(stack, request, settings, report)


def _taken(stack: ExitStack, request: ModelRequest, settings: Model, report: Report) -> _Hold:
    problem: VllmdError
    try:
        if request.path or not (is_directory(request.store) or _may_fetch(request, settings)):
            return _Hold(problem=PermissionMissing("no_store", f"{request.store} does not exist", "Make it, or set model.dir."))
        waiting = _teller(report, "lock")
        held = stack.enter_context(locked(request.store, hash12(request.identity), settings.lock_timeout_s, waiting))
        store.recover(request.store, request, _teller(report, "resolve"))
        return _Hold(held.say)
    except OSError as error:
        problem = translated(error, f"use {request.store}")
    except (PermissionMissing, StorageFailed, ModelInvalid) as error:
        if error.code == "lock_refused":
            raise
        problem = error
    _teller(report, "lock")(f"going on without a lock: {problem.what}")
    return _Hold(problem=problem)


def _may_fetch(request: ModelRequest, settings: Model) -> bool:
    """Whether a store that does not exist yet is worth making."""
    asked = sources.NETWORK.intersection(request.sources) - (set() if settings.r2_bucket else {"r2"})
    return bool(asked) and not settings.offline


def _teller(report: Report, phase: str) -> Callable[[str], None]:
    return lambda text: report(Progress(phase, text=text))


@dataclass(frozen=True, slots=True)
class _Asking:
    """One round through the sources."""

    request: ModelRequest
    context: Context
    report: Report
    rejected: Mapping[Path, VllmdError]
    hold: _Hold


def _ask(name: str, asking: _Asking) -> Outcome:
    source = sources.get(name)
    offline = asking.context.settings.offline and name in sources.NETWORK
    outcome = Outcome(name, "skipped", "offline") if offline else _outcome(source, asking)
    asking.report(Progress("resolve", name, text=f"Checking {source.label}... {outcome}"))
    return outcome


def _outcome(source: sources.Source, asking: _Asking) -> Outcome:
    try:
        finding = source.find(asking.request, asking.context)
        if isinstance(finding, Offered):
            return Outcome(source.name, "OK", model=_obtained(source, asking, finding))
    except OSError as error:
        return _failed(source, translated(error, f"look into {source.label}"))
    except VllmdError as error:
        if isinstance(error, TryLater):
            raise
        return _failed(source, error)
    if isinstance(finding, Found):
        return _choose(source, asking, finding.candidates)
    return Outcome(source.name, "not found" if isinstance(finding, NotFound) else "skipped", finding.reason)


def _obtained(source: sources.Source, asking: _Asking, offered: Offered) -> ResolvedModel:
    if asking.hold.problem is not None:
        raise asking.hold.problem
    from vllmd.models.obtain import Errand, obtain

    context = asking.context
    return obtain(Errand(source.name, asking.request, context.settings, context.environ, asking.report, asking.hold.say), offered)


def _choose(source: sources.Source, asking: _Asking, candidates: tuple[Candidate, ...]) -> Outcome:
    """The first candidate that is whole; each that is not is told, and the first one's fault is the source's."""
    errors: list[VllmdError] = []
    for candidate in candidates:
        try:
            model = _validated(source, asking, candidate)
        except _GRAVEST as error:
            errors.append(error)
            continue
        for passed in errors:
            asking.report(Progress("resolve", source.name, text=f"warning: passed over {passed.what}", level="warning"))
        if candidate.warning:
            asking.report(Progress("resolve", source.name, text=f"warning: {candidate.warning}", level="warning"))
        return Outcome(source.name, "OK", model=model)
    return _failed(source, errors[0])


def _validated(source: sources.Source, asking: _Asking, candidate: Candidate) -> ResolvedModel:
    if candidate.directory in asking.rejected:
        raise asking.rejected[candidate.directory]
    inventory = validate(candidate.directory, checks_of(asking.context.settings), candidate.sealed_ns)
    return ResolvedModel(
        identity=asking.request.identity,
        directory=candidate.directory,
        via=source.name,
        revision=candidate.revision or asking.request.revision,
        bytes=inventory.bytes,
        manifest_sha256=store.manifest_name(candidate.directory),
    )


def _failed(source: sources.Source, error: VllmdError) -> Outcome:
    return Outcome(source.name, "failed", error.what, error)


def _failure(request: ModelRequest, outcomes: list[Outcome]) -> VllmdError:
    """One error for all sources: the gravest one's, with what the others said."""
    for kind in (*_GRAVEST, ConfigError):
        for outcome in outcomes:
            if isinstance(outcome.error, kind):
                others = "; ".join(f"{other.source}: {other}" for other in outcomes if other is not outcome)
                what = outcome.error.what + (f" [{others}]" if others else "")
                return kind(outcome.error.code, what, outcome.error.hint)
    reasons = "; ".join(f"{outcome.source}: {outcome}" for outcome in outcomes)
    if request.path:
        return ModelNotFound("model_not_found", f"no model: {reasons}", "Give the directory that holds config.json.")
    unavailable = next((outcome.error for outcome in outcomes if isinstance(outcome.error, SourceUnavailable)), None)
    if unavailable is not None:
        return SourceUnavailable(unavailable.code, f"no source has {request.identity}: {reasons}", unavailable.hint)
    hint = f"Put the model into {request.store / (request.name or 'NAME')}, or into a hub cache, or give its directory as model.path."
    return ModelNotFound("model_not_found", f"no source has {request.identity}: {reasons}", hint)


def resolve_report(request: ModelRequest, settings: Model, environ: Mapping[str, str], report: Report) -> dict[str, Any]:
    """What `vllmd resolve NAME` prints as JSON (schema 1), on success and on failure; `status` is the exit status."""
    outcomes: list[Outcome] = []
    document: dict[str, Any] = {"schema": 1, "ok": False, "identity": request.identity, "status": 0}
    try:
        outcomes = search(request, settings, environ, report)
        model = outcomes[-1].model if outcomes else None
        if model is None:
            raise _failure(request, outcomes)
        document |= {"ok": True, **_model_fields(verified(model, request, settings, report))}
    except VllmdError as error:
        document |= {"status": int(error.status), "error": error.as_dict()}
    document["sources"] = [{"name": outcome.source, "status": outcome.status, "reason": outcome.reason} for outcome in outcomes]
    return document


def verified(model: ResolvedModel, request: ModelRequest, settings: Model, report: Report) -> ResolvedModel:
    """The model after its bytes were verified as the settings ask, for commands that people wait for: without the pass that a
    start makes while its engine imports. ModelInvalid."""
    if settings.verify == "headers" and model.manifest_sha256:  # a version's bytes are read only where that is asked for
        with explained(f"read {model.directory}"):
            if manifest_of(model.directory) is not None:
                return model  # `verify` would say the same, and takes 10 ms to import
    from vllmd.models.verify import verify

    alone = replace(settings, warm_up="off")
    return replace(model, manifest_sha256=verify(model, request, alone, report) or model.manifest_sha256)


def _model_fields(model: ResolvedModel) -> dict[str, Any]:
    return {
        "directory": str(model.directory),
        "via": model.via,
        "revision": model.revision,
        "bytes": model.bytes,
        "manifest_sha256": model.manifest_sha256,
    }
