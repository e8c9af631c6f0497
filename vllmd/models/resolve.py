"""The resolve stage: asks each source in turn, validates what it has, and takes the first model that is whole.

Only reads (what a crash of the existing tools left is put back first), so it goes on where the store cannot be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllmd.config.settings import Model
from vllmd.core.plan import ModelRequest, ResolvedModel
from vllmd.errors import ModelInvalid, ModelNotFound, PermissionMissing, StorageFailed, VllmdError
from vllmd.models import sources, store
from vllmd.models.identity import hash12
from vllmd.models.ioerrors import translated
from vllmd.models.lock import locked
from vllmd.models.places import is_directory
from vllmd.models.sources import Candidate, Context, Found, NotFound, Offered
from vllmd.models.validate import Checks, checks_of, validate
from vllmd.models.wire import Progress

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
    outcomes = search(request, settings, environ, report, rejected)
    model = outcomes[-1].model if outcomes else None
    if model is None:
        raise _failure(request, outcomes)
    report(Progress("resolve", model.via, text=f"Resolved: {model.identity} (via {model.via})"))
    return model


def search(
    request: ModelRequest, settings: Model, environ: Mapping[str, str], report: Report, rejected: Mapping[Path, VllmdError] = NONE_REJECTED
) -> list[Outcome]:
    """One outcome for each source that was asked; the last has the model, if any has it."""
    context = Context(settings, environ)
    outcomes: list[Outcome] = []
    with _lock(request, settings, report):
        for name in ("local",) if request.path else request.sources:
            outcome = _ask(sources.get(name), request, context, report, rejected)
            outcomes.append(outcome)
            if outcome.model:
                break
    return outcomes


@contextmanager
def _lock(request: ModelRequest, settings: Model, report: Report) -> Iterator[None]:
    """The identity's lock, and under it the recovery. Without it where the store cannot be written: then nobody changes it;
    nor for a directory outside the store, which nobody of us changes."""
    with ExitStack() as stack:
        try:
            if not request.path and is_directory(request.store):
                waiting = _teller(report, "lock")
                stack.enter_context(locked(request.store, hash12(request.identity), settings.lock_timeout_s, waiting))
                store.recover(request.store, request, _teller(report, "resolve"))
        except OSError as error:
            _teller(report, "lock")(f"going on without a lock: {translated(error, f'use {request.store}').what}")
        except (PermissionMissing, StorageFailed, ModelInvalid) as error:
            if error.code == "lock_refused":
                raise
            _teller(report, "lock")(f"going on without a lock: {error.what}")
        yield


def _teller(report: Report, phase: str) -> Callable[[str], None]:
    return lambda text: report(Progress(phase, text=text))


def _ask(source: sources.Source, request: ModelRequest, context: Context, report: Report, rejected: Mapping[Path, VllmdError]) -> Outcome:
    outcome = _outcome(source, request, context, report, rejected)
    report(Progress("resolve", source.name, text=f"Checking {source.label}... {outcome}"))
    return outcome


def _outcome(source: sources.Source, request: ModelRequest, context: Context, report: Report, rejected: Mapping[Path, VllmdError]) -> Outcome:
    try:
        finding = source.find(request, context)
    except OSError as error:
        return _failed(source, translated(error, f"look into {source.label}"))
    if isinstance(finding, Found):
        return _choose(source, request, finding.candidates, checks_of(context.settings), report, rejected)
    if isinstance(finding, Offered):
        raise NotImplementedError(source.name)
    return Outcome(source.name, "not found" if isinstance(finding, NotFound) else "skipped", finding.reason)


def _choose(
    source: sources.Source, request: ModelRequest, candidates: tuple[Candidate, ...], checks: Checks, report: Report, rejected: Mapping[Path, VllmdError]
) -> Outcome:
    """The first candidate that is whole; each that is not is told, and the first one's fault is the source's."""
    errors: list[VllmdError] = []
    for candidate in candidates:
        try:
            model = _validated(source, request, candidate, checks, rejected)
        except _GRAVEST as error:
            errors.append(error)
            continue
        for passed in errors:
            report(Progress("resolve", source.name, text=f"warning: passed over {passed.what}"))
        return Outcome(source.name, "OK", model=model)
    return _failed(source, errors[0])


def _validated(source: sources.Source, request: ModelRequest, candidate: Candidate, checks: Checks, rejected: Mapping[Path, VllmdError]) -> ResolvedModel:
    if candidate.directory in rejected:
        raise rejected[candidate.directory]
    inventory = validate(candidate.directory, checks)
    return ResolvedModel(
        identity=request.identity,
        directory=candidate.directory,
        via=source.name,
        revision=candidate.revision or request.revision,
        bytes=inventory.bytes,
        manifest_sha256=store.manifest_name(candidate.directory),
    )


def _failed(source: sources.Source, error: VllmdError) -> Outcome:
    return Outcome(source.name, "failed", error.what, error)


def _failure(request: ModelRequest, outcomes: list[Outcome]) -> VllmdError:
    reasons = "; ".join(f"{outcome.source}: {outcome}" for outcome in outcomes)
    for kind in _GRAVEST:
        for outcome in outcomes:
            if isinstance(outcome.error, kind):
                others = "; ".join(f"{other.source}: {other}" for other in outcomes if other is not outcome)
                what = outcome.error.what + (f" [{others}]" if others else "")
                return kind(outcome.error.code, what, outcome.error.hint)
    if request.path:
        return ModelNotFound("model_not_found", f"no model: {reasons}", "Give the directory that holds config.json.")
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
    """The model after its bytes were verified as the settings ask. ModelInvalid."""
    from vllmd.models.verify import verify

    return replace(model, manifest_sha256=verify(model, request, settings, report) or model.manifest_sha256)


def _model_fields(model: ResolvedModel) -> dict[str, Any]:
    return {
        "directory": str(model.directory),
        "via": model.via,
        "revision": model.revision,
        "bytes": model.bytes,
        "manifest_sha256": model.manifest_sha256,
    }
