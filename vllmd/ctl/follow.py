"""`vllmctl start|restart|stop`: asks systemd, then watches until it has happened, and says why if it has not."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.ctl import files
from vllmd.ctl import unit as units
from vllmd.ctl.progress import Shown, progress
from vllmd.ctl.unit import Systemd, UnitState
from vllmd.errors import Status, TryLater, VllmdError

_INTERVAL_S = 0.2
_EXAMPLE_S, _LOOK_S = 0.5, 0.05
_BEFORE_EXEC = {
    203: ("the program of the unit cannot be executed", "systemctl cat {unit} shows which; install again?"),
    216: ("a group of the unit does not exist", "systemd-sysusers"),
    217: ("the unit's user does not exist", "systemd-sysusers"),
    226: ("systemd could not set up the unit's file system", "a ReadWritePaths= that does not exist? systemctl cat {unit}"),
    243: ("a credential of the unit could not be read", "look at LoadCredential= in systemctl cat {unit}"),
}
"""systemd's own statuses: it failed before our program ran."""
_RESULTS = {
    "timeout": ("systemd ended it: it said nothing within its time", Status.TEMPFAIL),
    "watchdog": ("systemd ended it: the supervisor itself hung", Status.TEMPFAIL),
    "signal": ("the supervisor was killed by a signal", Status.SOFTWARE),
    "core-dump": ("the supervisor crashed", Status.SOFTWARE),
    "oom-kill": ("the kernel killed it: out of memory", Status.SOFTWARE),
    "protocol": ("the supervisor ended before it was ready", Status.SOFTWARE),
    "start-limit-hit": ("it failed too often; systemd has given up", Status.TEMPFAIL),
}


def bring_up(paths: Paths, verb: str, name: str, *, wait: bool, timeout_s: float | None, as_json: bool = False) -> int:
    """Starts or restarts; 0 when READY. Raises VllmdError with the instance's own reason and status."""
    name = units.instance_name(name)
    systemd = units.need_systemd(paths)
    before = systemd.show(name)
    if verb == "start" and before.active == "active":
        if as_json:
            return _print(paths, name, "active", began=None)
        _say(f"{name} is running already{_at(paths, name)}")
        return 0
    stamp = files.last_stamp(paths, name)
    if before.active == "failed":
        systemd.forgive(name)
    systemd.submit(verb, name)
    if not wait:
        return _print(paths, name, "queued", began=None) if as_json else 0
    began = time.monotonic()
    deadline = None if timeout_s is None else began + timeout_s
    unit = _follow(systemd, paths, name, lambda unit: not unit.has_job, deadline)
    if unit.active == "active" and as_json:
        _await_example(paths, name)
        return _print(paths, name, unit.active, began=began)
    if unit.active == "active":
        _say(f"{name} is ready after {time.monotonic() - began:.1f} s{_at(paths, name)}")
        _say_example(paths, name)
        return 0
    fresh = files.last_stamp(paths, name) != stamp
    raise failure(name, unit, files.problem(files.last(paths, name)) if fresh else None, systemd.prefix)


def bring_down(paths: Paths, name: str, *, as_json: bool = False) -> int:
    """Stops; 0 when nothing runs any more."""
    name = units.instance_name(name)
    systemd = units.need_systemd(paths)
    before = systemd.show(name)
    if before.active in ("inactive", "failed"):
        if as_json:
            return _print(paths, name, before.active, began=None)
        _say(f"{name} is not running")
        return 0
    began = time.monotonic()
    systemd.submit("stop", name)
    unit = _follow(systemd, paths, name, lambda unit: not unit.has_job and unit.active in ("inactive", "failed"), None)
    if unit.active == "failed":
        raise failure(name, unit, files.problem(files.last(paths, name)), systemd.prefix, did="stopped, but not cleanly")
    if as_json:
        return _print(paths, name, unit.active, began=began)
    _say(f"{name} stopped after {time.monotonic() - began:.1f} s")
    return 0


def _follow(systemd: Systemd, paths: Paths, name: str, settled: Callable[[UnitState], bool], deadline: float | None) -> UnitState:
    """Shows progress until the unit has settled. systemd bounds its jobs; `deadline` (monotonic) bounds only the watching."""
    with progress(name) as show:
        while True:
            unit = systemd.show(name)
            if settled(unit):
                return unit
            show(_shown(paths, name, unit))
            if deadline is not None and time.monotonic() >= deadline:
                raise TryLater("still_starting", f"{name} is not ready yet; its start goes on", f"{systemd.prefix} status {name}")
            time.sleep(_INTERVAL_S)


def _shown(paths: Paths, name: str, unit: UnitState) -> Shown:
    said = files.status(paths, name)
    state = files.text(said, "state")
    if unit.active in ("inactive", "failed"):
        return Shown("queued", None, "")  # the unit still shows its last life
    if not said or state in ("stopped", "failed"):
        return Shown(unit.active, None, "")
    phase = files.text(said, "phase") or state
    return Shown(phase, files.number(said, "progress", "fraction"), files.text(said, "progress", "text"))


@dataclass(frozen=True, slots=True)
class _Reason:
    code: str
    what: str
    hint: str
    status: Status


def failure(name: str, unit: UnitState, written: files.Problem | None, prefix: str, *, did: str = "did not start") -> VllmdError:
    """Why a unit is not active: what its supervisor wrote, else what systemd knows."""
    reason = _written(written, unit) if written and written.what else _by_systemd(name, unit, prefix)
    hint = reason.hint or f"{prefix} logs {name}"
    if unit.sub == "auto-restart":
        hint += f" (systemd tries again in a moment; {prefix} stop {name} ends that)"
    return VllmdError(reason.code, f"{name} {did}: {reason.what}", hint, status=reason.status)


def _written(problem: files.Problem, unit: UnitState) -> _Reason:
    number = problem.status or (unit.exit_status if unit.exited else 0)
    return _Reason(problem.code, problem.what, problem.hint, _status(number))


def _by_systemd(name: str, unit: UnitState, prefix: str) -> _Reason:
    if unit.result == "exit-code" and unit.exit_status in _BEFORE_EXEC:
        what, hint = _BEFORE_EXEC[unit.exit_status]
        return _Reason("unit_setup", f"{what} (status {unit.exit_status})", hint.format(unit=units.unit(name)), Status.CONFIG)
    if unit.result == "exit-code":
        return _Reason("exited", f"the supervisor exited with status {unit.exit_status}", "", _status(unit.exit_status))
    if unit.result in _RESULTS:
        what, status = _RESULTS[unit.result]
        return _Reason(unit.result, what, "", status)
    if unit.active == "inactive":
        return _Reason("stopped", "it was stopped meanwhile", f"{prefix} status {name}", Status.TEMPFAIL)
    return _Reason("not_active", f"systemd says {unit.active} ({unit.sub}), {unit.result or 'no result'}", "", Status.SOFTWARE)


def _status(number: int) -> Status:
    try:
        return Status(number) if number else Status.SOFTWARE
    except ValueError:
        return Status.SOFTWARE


def _at(paths: Paths, name: str) -> str:
    said = files.status(paths, name)
    if files.text(said, "state") == "unconfigured":
        return f", but no model is selected: it serves nothing yet. Run: {paths.vllmctl} model set {name} PRESET|MODEL"
    endpoint = files.text(said, "endpoint")
    return f" at {endpoint}" if endpoint else ""


def _say_example(paths: Paths, name: str) -> None:
    if said := _await_example(paths, name):
        _say(f"try: {printable(said)}")


def _await_example(paths: Paths, name: str) -> str:
    """The request that the supervisor itself thinks works; it is written down a moment after READY=1. '' where there is none."""
    end = time.monotonic() + _EXAMPLE_S
    while not (said := files.text(files.status(paths, name), "example")) and time.monotonic() < end:
        if files.text(files.status(paths, name), "state") != "ready":
            break
        time.sleep(_LOOK_S)
    return said


def _print(paths: Paths, name: str, unit: str, *, began: float | None) -> int:
    """`began`: None where nothing was waited for."""
    serves = unit == "active"
    said = files.status(paths, name) if serves else {}
    took_s = None if began is None else round(time.monotonic() - began, 3)
    words = {key: files.text(said, key) for key in ("state", "endpoint", "example")}
    _say(json.dumps({"schema": 1, "instance": name, "unit": unit, "seconds": took_s, **words}))
    return 0


def _say(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()
