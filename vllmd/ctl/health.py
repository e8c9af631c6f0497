"""`vllmctl health NAME`: may requests be sent there? One line and an exit status, for load balancers and scripts.

Asks neither systemd nor the engine: the supervisor's status.json says what it knows, and a connection shows that somebody still
listens where it says so. A supervisor that was killed leaves its last word behind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.ctl import alive, files
from vllmd.ctl.unit import instance_name
from vllmd.errors import PermissionMissing, UsageError

READY, FAILED, LOADING, NO_MODEL = "ready", "failed", "loading", "no-model"
STATUS = {READY: 0, FAILED: 1, LOADING: 2, NO_MODEL: 3}
STARTING = frozenset({"created", "checking", "resolving", "launching", "starting", "proven"})
PATIENCE = (
    "The vLLM API is starting. A first-time model download plus load can take 30+ minutes; loading an already-cached model can take "
    "15+ minutes. Exact time depends on your hardware resources and network bandwidth."
)


@dataclass(frozen=True, slots=True)
class Health:
    """`state` is a key of STATUS. `hint`: what to do about it."""

    state: str
    message: str
    hint: str = ""

    @property
    def status(self) -> int:
        return STATUS[self.state]


def health(paths: Paths, name: str, *, as_json: bool) -> int:
    """Prints; the exit status is that of the health."""
    name = instance_name(name)
    said, ended = files.status(paths, name), files.last(paths, name)
    if not said:
        _must_exist(paths, name, is_known=bool(ended))
    found = judge(paths, name, said, ended)
    if as_json:
        sys.stdout.write(json.dumps(as_dict(name, found, said)) + "\n")
    else:
        doing = _doing(said) if found.state == LOADING else ""
        sys.stdout.write(printable("\n".join(filter(None, (found.message, doing, f"  hint: {found.hint}" if found.hint else "")))) + "\n")
    return found.status


def as_dict(name: str, found: Health, said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "instance": name,
        "health": found.state,
        "status": found.status,
        "message": found.message,
        "hint": found.hint,
        "state": files.text(said, "state") or "stopped",
        "phase": files.text(said, "phase"),
        "fraction": files.number(said, "progress", "fraction"),
        "endpoint": files.text(said, "endpoint"),
    }


def judge(paths: Paths, name: str, said: Mapping[str, Any], ended: Mapping[str, Any]) -> Health:
    state = files.text(said, "state")
    problem = files.problem(said)
    if state == "unconfigured":
        found = Health(NO_MODEL, f"No model selected. Run: {paths.vllmctl} model set {name} PRESET|MODEL")
    elif state == "ready":
        found = _listening(paths, name, said)
    elif state in STARTING and problem is None:
        found = Health(LOADING, PATIENCE)
    elif state == "draining" and problem is None:
        found = Health(FAILED, "The vLLM API is stopping: requests in flight may finish")
    else:
        return _not_running(paths, name, problem or files.problem(ended))
    if alive.has_supervisor(paths, name) is False:
        return Health(FAILED, f"The supervisor of {name} is gone: it was {state}, and ended without a word", f"{paths.vllmctl} status {name}")
    return found


def _listening(paths: Paths, name: str, said: Mapping[str, Any]) -> Health:
    endpoint = files.text(said, "endpoint")
    if endpoint and alive.serves(endpoint) is False:
        return Health(FAILED, f"The vLLM API was ready, but nobody listens at {endpoint} any more", f"{paths.vllmctl} status {name}")
    return Health(READY, "The vLLM API is ready")


def _not_running(paths: Paths, name: str, problem: files.Problem | None) -> Health:
    if problem is None:
        return Health(FAILED, f"{name} is not running", f"{paths.vllmctl} start {name}")
    if problem.code == "start_timeout":
        return Health(FAILED, f"{problem.what.replace('the engine', 'The vLLM API', 1)}. Check the service logs for errors.", f"{paths.vllmctl} logs {name}")
    return Health(FAILED, problem.what, problem.hint)


def _doing(said: Mapping[str, Any]) -> str:
    fraction = files.number(said, "progress", "fraction")
    percent = "" if fraction is None else f"{max(0.0, min(1.0, fraction)):.0%}"
    words = (files.text(said, "phase") or files.text(said, "state"), percent, files.text(said, "progress", "text"))
    return "  now: " + " ".join(dict.fromkeys(filter(None, words)))


def _must_exist(paths: Paths, name: str, *, is_known: bool) -> None:
    """Nothing was read: because nothing is there, or because we may not."""
    if files.is_refused(paths, name):
        raise PermissionMissing("status_refused", f"you may not read {paths.instance_runtime(name)}/status.json", f"sudo {paths.vllmctl} health {name}")
    if not is_known and not paths.instance_config(name).exists():
        raise UsageError("instance_unknown", f"no instance {name}: {paths.instance_config(name)} does not exist", f"{paths.vllmctl} status lists what there is")
