"""preflight, whole: lock, ports, GPUs, reclaim, memory, in an order in which nothing that works is ended for nothing.

    whose are the ports? -> may the GPUs be used? -> end what holds the ports -> is the memory back?

A port that is not ours to take is said first, at once. The GPU gates come before anything is ended, since a start that
they refuse must not cost a working server; the memory gate comes again afterwards, when the memory had time to return.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllmd.config.redact import redact_argv
from vllmd.config.settings import Preflight
from vllmd.core.plan import Endpoint
from vllmd.errors import VllmdError
from vllmd.preflight import claims as rules
from vllmd.preflight import gpu, lock, reclaim
from vllmd.preflight.attribution import Claim
from vllmd.preflight.claims import Judgement, Me, Own, Policy, Ruling, Standalone, Stray
from vllmd.preflight.endpoints import Look, Refused, claims_of, holders_of, wait_until_free
from vllmd.preflight.gates import Limits, Wanted
from vllmd.preflight.owner import OwnerRules, ProcessFacts
from vllmd.preflight.report import Report
from vllmd.system import procfs
from vllmd.system.files import exhausted

_RESCANS = 3
_RESCAN_S = 0.05
_MEMORY_POLL_S = 0.5
_SHOWN = 400


@dataclass(frozen=True, slots=True)
class PreflightRequest:
    """What is wanted. `lock_path` None: the caller holds the port's lock. `policy` says whom we may end. `remove_stale`
    lets a stale unix socket be removed. `python`, `cuda`, `archs`: of the engine that will start (core.plan.Installed)."""

    endpoints: tuple[Endpoint, ...]
    settings: Preflight
    policy: Policy
    gpus: Wanted = "all"
    memory_fraction: float = 0.0
    python: str = ""
    cuda: str = ""
    archs: tuple[str, ...] = ()
    lock_path: Path | None = None
    remove_stale: bool = False
    gpu_release_timeout_s: float = 30.0

    @property
    def gpu(self) -> gpu.GpuRequest:
        settings = self.settings
        limits = Limits(
            warn_pct=settings.gpu_warn_pct,
            fail_on=frozenset(settings.gpu_fail_on),
            min_free_mib=None if settings.gpu_min_free == "auto" else int(settings.gpu_min_free),
            memory_fraction=self.memory_fraction,
            max_temp_c=settings.max_gpu_temp_c,
            max_util_pct=settings.max_gpu_util_pct,
        )
        wanted = "none" if settings.skip_gpu_check else self.gpus
        torch = settings.require_torch
        return gpu.GpuRequest(wanted, limits, settings.gpu_timeout_s, torch, self.python, self.cuda, self.archs)


@dataclass(slots=True)
class _Draft:
    """The report while it is made."""

    request: PreflightRequest
    claims: list[Claim] = field(default_factory=list)
    processes: tuple[ProcessFacts, ...] = ()
    gpus: gpu.GpuResult = field(default_factory=gpu.GpuResult)
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def report(self, ruling: Ruling, action: str = "") -> Report:
        tcp = [each for each in self.request.endpoints if each.kind == "tcp"]
        listeners = [claim.listener for claim in self.claims]
        processes = {each.pid: each for each in (*self.processes, *(h for claim in self.claims for h in claim.holders))}
        return Report(
            ok=ruling.code == 0,
            code=ruling.code,
            host=tcp[0].host if tcp else next((each.path for each in self.request.endpoints), ""),
            ports=tuple(each.port for each in tcp),
            action=action,
            reason=ruling.reason,
            error=ruling.error,
            hint=ruling.hint,
            dry_run=self.request.settings.dry_run,
            pids=tuple(sorted(each.pid for each in self.processes) if self.processes else sorted(processes)),
            units=tuple(dict.fromkeys(each.unit for each in listeners if each.unit)),
            uids=tuple(dict.fromkeys(each.uid for each in listeners if each.uid is not None)),
            cmdlines={pid: _shown(each.argv) for pid, each in processes.items()},
            gpus=self.gpus.gpus,
            gpu_check_source=self.gpus.source,
            warnings=(*self.warnings, *self.gpus.warnings),
        )


def _shown(argv: tuple[str, ...]) -> str:
    """Other people's command lines carry other people's keys."""
    text = shlex.join(redact_argv(argv)) if len(argv) > 1 else " ".join(redact_argv(" ".join(argv).split()))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def run(request: PreflightRequest) -> Report:
    """All checks, and what they may end. Blocks, under the deadlines of the settings; raises nothing expected: a failure
    is a report that is not ok (Report.as_error makes the exception of it)."""
    draft = _Draft(request)
    try:
        with _locked(request.lock_path):
            return draft.report(Ruling(0), _checks(draft))
    except Refused as refused:
        return draft.report(refused.ruling)
    except VllmdError as error:
        return draft.report(Ruling(1, error.code, error.what, error.hint))
    except OSError as error:
        refused_by_host = exhausted(error, "the system cannot be looked at")
        if refused_by_host is not None:
            return draft.report(Ruling(1, refused_by_host.code, refused_by_host.what, refused_by_host.hint))
        hint = "Preflight needs /proc, and the permission to read it."
        return draft.report(Ruling(1, "proc_unavailable", f"the system cannot be looked at: {error}", hint))


@contextlib.contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with lock.take(path):
        yield


def _checks(draft: _Draft) -> str:
    """The action that was taken. Refused ends it."""
    request, me = draft.request, _me()
    roots = _judged(draft, me).roots and _judged(draft, me, thorough=True).roots
    _check_gpus(draft, is_reclaiming=bool(roots))
    if not roots:
        return "noop"
    if request.settings.dry_run:
        draft.processes = roots
        return "would_stop"
    roots = _judged(draft, me, thorough=True).roots  # the GPU check can have taken a minute: nothing old is acted upon
    if not roots:
        return "noop"
    _end(draft, roots, me)
    _wait_for_memory(draft)
    return "stopped"


def _me() -> Me:
    pid = os.getpid()
    return Me(os.geteuid(), procfs.boot_id(), frozenset({pid, *procfs.ancestors(pid)}))


def _judged(draft: _Draft, me: Me, *, thorough: bool = False) -> Judgement:
    """Who holds the ports, and whether they may be ended. Looked at again before it is called unattributable: the owner
    may have ended in the middle of the scan."""
    settings = draft.request.settings
    owner = OwnerRules(settings.owner_regex, settings.process_signatures)
    look = Look(settings, draft.request.remove_stale, draft.warn, thorough)
    for attempt in range(_RESCANS):
        draft.claims = [claim for each in draft.request.endpoints for claim in claims_of(each, look)]
        judgement = rules.judge(draft.claims, owner, me, draft.request.policy)
        if judgement.ruling.code != 4:
            break
        if attempt < _RESCANS - 1:
            time.sleep(_RESCAN_S)
    if judgement.ruling.code:
        raise Refused(judgement.ruling)
    return replace(judgement, roots=_with_family(draft.request.policy, judgement.roots, owner, me))


def _with_family(policy: Policy, roots: tuple[ProcessFacts, ...], owner: OwnerRules, me: Me) -> tuple[ProcessFacts, ...]:
    """The processes to begin with: for strangers' vLLMs their topmost one, for our own launches whatever is left of them."""
    own = policy.own if isinstance(policy, Stray) else policy
    if isinstance(own, Own):
        roots = (*roots, *reclaim.leftovers(own.launches, me))
    if not isinstance(policy, Own):
        roots = tuple(reclaim.topmost(each, owner, me.untouchable) for each in roots)
    return tuple({each.pid: each for each in roots}.values())


def _check_gpus(draft: _Draft, *, is_reclaiming: bool) -> None:
    """What holds the port may hold the memory too: until it has ended, the gate asks whether there is enough in all."""
    draft.gpus = gpu.check(draft.request.gpu, "total" if is_reclaiming else "free")
    if draft.gpus.failures:
        raise Refused(Ruling(1, "gpu_hard_fail", "; ".join(draft.gpus.failures), draft.gpus.hint))


def _end(draft: _Draft, roots: tuple[ProcessFacts, ...], me: Me) -> None:
    settings = draft.request.settings
    draft.processes = roots
    units = {claim.listener.unit for claim in draft.claims if claim.listener.unit.endswith(".service")}
    for unit in sorted(units):
        draft.warn(f"it ran in {unit}, and systemd may start it again: `systemctl stop {unit}`")
    _, remaining = reclaim.stop(roots, me.untouchable, settings.term_grace_s)
    endpoints = draft.request.endpoints
    if wait_until_free(endpoints, settings.port_free_timeout_s, settings.port_free_poll_s) and not remaining:
        return
    draft.claims = [claim for each in endpoints for claim in holders_of(each)]
    pids = remaining or sorted({pid for claim in draft.claims for pid in claim.listener.pids})
    known = {each.pid: each for each in (*roots, *(h for claim in draft.claims for h in claim.holders))}
    draft.processes = tuple(known.get(pid, ProcessFacts(pid, argv=procfs.cmdline(pid))) for pid in pids)
    what = f"what held the port was stopped, and after {settings.port_free_timeout_s:g} s it is still held"
    if remaining:
        what = f"processes do not end: {' '.join(map(str, remaining))}"
    hint = "A process in state D waits for a driver or a disk, and cannot be killed: `ps -o pid,stat,wchan:32,cmd -p PID`."
    raise Refused(Ruling(5, "port_still_listening_after_stop", what, hint))


def _wait_for_memory(draft: _Draft) -> None:
    """The memory of what was ended comes back 0.5 to 1.5 s after the kill."""
    request = draft.request.gpu
    if not request.is_wanted or "memory" not in request.limits.fail_on:
        return
    end = time.monotonic() + draft.request.gpu_release_timeout_s
    request = replace(request, require_torch=False)
    while True:
        draft.gpus = gpu.check(request)
        if not draft.gpus.failures:
            return
        left = end - time.monotonic()
        if left <= 0:
            hint = "`nvidia-smi` shows who holds it; a process that outlived its server must be ended by hand."
            raise Refused(Ruling(1, "gpu_memory_not_back", "; ".join(draft.gpus.failures), hint))
        time.sleep(min(_MEMORY_POLL_S, left))


def policy_of(settings: Preflight, own: Own | None) -> Policy:
    """The policy that the settings ask for: `own` is the instance's, None for the standalone command."""
    if own is None:
        return Standalone(other_uid=settings.allow_kill_other_uid)
    return Stray(own) if settings.reclaim == "stray" else own
