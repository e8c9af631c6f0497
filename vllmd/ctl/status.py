"""`vllmctl status`: the unit, what its supervisor says and how it last ended, as one screen or one JSON object."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.ctl import files
from vllmd.ctl import unit as units
from vllmd.ctl.unit import UnitState
from vllmd.engines import choice
from vllmd.errors import PermissionMissing, UsageError

SERVING = frozenset({"ready", "unconfigured"})
NOT_SERVING = 3
UNKNOWN = "unknown"
"""Somebody else may read it."""
_BAR = 20

_INCIDENT = re.compile(r"[0-9A-Za-z.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Instance:
    """Everything known about one instance. `unit` is None where systemd does not run it."""

    name: str
    state: str
    said: Mapping[str, Any]
    ended: Mapping[str, Any]
    unit: UnitState | None

    @property
    def problem(self) -> files.Problem | None:
        """What is wrong now, or what ended the last life while nothing serves since."""
        return files.problem(self.said) or (None if self.state in SERVING else files.problem(self.ended))


def status(paths: Paths, name: str | None, *, as_json: bool) -> int:
    """Prints; 0 when the instance serves (or all were asked for), else 3."""
    systemd = units.Systemd(paths.scope) if units.runs(paths.scope) else None
    chosen = [units.instance_name(name)] if name else names(paths, systemd)
    found = look_at(paths, chosen, systemd)
    _must_read(paths, found, name)
    if name and not _known(paths, found[0]):
        raise UsageError("instance_unknown", f"no instance {found[0].name}: {paths.instance_config(found[0].name)} does not exist", "vllmctl status lists what there is")
    if as_json:
        sys.stdout.write(json.dumps({"schema": 1, "instances": [as_dict(each) for each in found]}) + "\n")
    elif name:
        sys.stdout.write(printable("\n".join(screen(found[0], paths))) + "\n")
    else:
        sys.stdout.write(printable("\n".join(table(found, paths))) + "\n")
    return NOT_SERVING if name and found[0].state not in SERVING else 0


def _must_read(paths: Paths, found: list[Instance], name: str | None) -> None:
    """To somebody who may not read it, what serves looks as if it were stopped, or were not there. PermissionMissing."""
    if not found and paths.config.exists() and not os.access(paths.config, os.R_OK | os.X_OK):
        raise PermissionMissing("config_unreadable", f"you may not read {paths.config}", f"sudo {paths.vllmctl} status")
    if name and found[0].state == UNKNOWN:
        raise PermissionMissing("status_refused", f"you may not read {paths.instance_runtime(found[0].name)}/status.json", f"sudo {paths.vllmctl} status {found[0].name}")


def names(paths: Paths, systemd: units.Systemd | None) -> list[str]:
    return sorted({*files.names(paths), *(systemd.names() if systemd else ())})


def _known(paths: Paths, instance: Instance) -> bool:
    return bool(instance.said or instance.ended or paths.instance_config(instance.name).exists() or (instance.unit and instance.unit.active != "inactive"))


def look_at(paths: Paths, names: list[str], systemd: units.Systemd | None) -> list[Instance]:
    shown = systemd.show_all(names) if systemd else {}
    return [_look(paths, each, shown.get(each)) for each in names]


def _look(paths: Paths, name: str, unit: UnitState | None) -> Instance:
    said = files.status(paths, name)
    state = UNKNOWN if not said and unit is None and files.is_refused(paths, name) else true_state(said, unit)
    return Instance(name, state, said, files.last(paths, name), unit)


def true_state(said: Mapping[str, Any], unit: UnitState | None) -> str:
    """The supervisor's word, unless systemd knows that there is no supervisor any more."""
    word = files.text(said, "state")
    if unit is None:
        return word or "stopped"
    if unit.active in ("inactive", "failed"):
        return "failed" if unit.active == "failed" else "stopped"
    if unit.sub == "auto-restart":
        return "restarting"
    return word or unit.active


def as_dict(instance: Instance) -> dict[str, Any]:
    unit = instance.unit
    shown = None
    if unit is not None:
        shown = {
            "active": unit.active,
            "sub": unit.sub,
            "result": unit.result,
            "exit_status": unit.exit_status if unit.exited else None,
            "main_pid": unit.main_pid,
            "restarts": unit.restarts,
            "enabled": unit.enabled,
            "memory_bytes": unit.memory_bytes,
        }
    return {"instance": instance.name, "state": instance.state, "unit": shown, "status": instance.said or None, "last": instance.ended or None}


def table(found: list[Instance], paths: Paths) -> Iterator[str]:
    """One line for each instance."""
    if not found:
        yield f"no instances: {paths.vllmctl} model set NAME PRESET makes one ({paths.vllmctl} model presets shows what fits), and {paths.vllmctl} start NAME starts it"
        return
    width = max(len(each.name) for each in found)
    for each in found:
        problem = each.problem
        more = f"{problem.what}" if problem else " ".join(filter(None, (files.text(each.said, "endpoint"), model_of(each.said))))
        if until := files.text(each.said, "paused", "until"):
            more = f"[paused until {until}] {more}"
        yield f"{_dot(each)} {each.name:<{width}}  {each.state:<12} {more}".rstrip()


def screen(instance: Instance, paths: Paths) -> Iterator[str]:
    """What a person wants to know about one instance, on one screen."""
    said = instance.said
    yield f"{_dot(instance)} {instance.name}  {instance.state}{_since(instance)}"
    rows = [
        ("phase", _phase(instance)),
        ("model", model_of(said)),
        ("endpoint", ", ".join(said["endpoints"]) if _strings(said.get("endpoints")) else files.text(said, "endpoint")),
        ("engine", _engine(said)),
        ("", _other_engine(instance, paths)),
        ("gpus", ", ".join(each[:12] for each in said["gpus"]) if _strings(said.get("gpus")) else ""),
        ("unit", _unit(instance)),
        ("memory", _bytes(instance.unit.memory_bytes) if instance.unit and instance.unit.memory_bytes is not None else ""),
        *(("warning", str(each)) for each in said.get("warnings") or () if isinstance(said.get("warnings"), list)),
        ("paused", _paused(said)),
        *_problem_rows(instance),
    ]
    for label, value in rows:
        if value:
            yield f"  {label:<10} {value}"


def _paused(said: Mapping[str, Any]) -> str:
    """Until when nothing is judged, by whom and why, and what waits for the end of it."""
    until, by, why, pending = (files.text(said, "paused", key) for key in ("until", "by", "why", "pending"))
    if not until:
        return ""
    return f"until {until} by {by}" + (f": {why}" if why else "") + (f"; then it ends, because {pending}" if pending else "")


def _problem_rows(instance: Instance) -> Iterator[tuple[str, str]]:
    if instance.problem is not None:
        at = "" if files.problem(instance.said) else _ago(files.moment(instance.ended, "at"))
        yield "error", f"{instance.problem.what}{f' ({at} ago)' if at else ''}"
        yield "hint", instance.problem.hint
    elif files.problem(instance.ended) is not None and (ended := files.problem(instance.ended)):
        yield "last error", f"{ended.what} ({_ago(files.moment(instance.ended, 'at')) or 'long'} ago)"
    is_of_now = not files.problem(instance.said) or files.text(instance.said, "launch_id") == files.text(instance.ended, "launch_id")
    if is_of_now and _INCIDENT.fullmatch(incident := files.text(instance.ended, "incident")):
        yield "evidence", f"vllmctl incidents {instance.name} {incident}"


def _dot(instance: Instance) -> str:
    return {"ready": "●", "failed": "×", "stopped": "○", "unconfigured": "○"}.get(instance.state, "◐")


def _since(instance: Instance) -> str:
    since = files.moment(instance.said, "since")
    if since is None or instance.state in ("stopped", "failed", "restarting"):
        changed = instance.unit.changed if instance.unit else ""
        return f"  since {changed}" if changed else ""
    return f"  since {since:%Y-%m-%d %H:%M:%S} ({_ago(since)})"


def _ago(moment: datetime | None) -> str:
    if moment is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {name}"
    return f"{seconds} s"


def _phase(instance: Instance) -> str:
    if instance.state in SERVING | {"stopped", "failed"}:
        return ""
    fraction = files.number(instance.said, "progress", "fraction")
    bar = ""
    if fraction is not None:
        filled = round(max(0.0, min(1.0, fraction)) * _BAR)
        bar = f"[{'#' * filled}{'.' * (_BAR - filled)}] {fraction:.0%}"
    return "  ".join(filter(None, (files.text(instance.said, "phase"), bar, files.text(instance.said, "progress", "text"))))


def model_of(said: Mapping[str, Any]) -> str:
    name, directory, via = (files.text(said, "model", key) for key in ("id", "directory", "via"))
    where = ", ".join(filter(None, (directory if directory != name else "", f"via {via}" if via else "")))
    return f"{name} ({where})" if name and where else name or directory


def _engine(said: Mapping[str, Any]) -> str:
    pid = files.number(said, "engine", "pid")
    words = [files.text(said, "engine", "name"), files.text(said, "engine", "version"), f"pid {pid:.0f}" if pid else ""]
    return " ".join(filter(None, words))


def other_engine(said: Mapping[str, Any], paths: Paths) -> str:
    """The directory name of the chosen engine, where the instance follows the choice and runs another one; else ''."""
    program, chosen = files.text(said, "engine", "executable"), choice.current_name(paths.engines)
    if not program or not chosen or files.text(said, "engine", "chosen") != "current":
        return ""
    return chosen if os.path.dirname(os.path.dirname(program)) != os.path.realpath(paths.engines / chosen) else ""  # noqa: PTH120 - no look at the disk


def _other_engine(instance: Instance, paths: Paths) -> str:
    chosen = other_engine(instance.said, paths) if instance.state not in ("stopped", "failed") else ""
    return f"{chosen} is chosen now: it is taken at the next start (vllmctl restart {instance.name})" if chosen else ""


def _unit(instance: Instance) -> str:
    unit = instance.unit
    if unit is None:
        return "none: run by hand"
    ended = f", exit status {unit.exit_status}" if unit.active == "failed" and unit.exited else ""
    result = f", {unit.result}" if unit.result not in ("", "success") else ""
    restarts = f", {unit.restarts} restart{'' if unit.restarts == 1 else 's'}"
    return f"{units.unit(instance.name)} {unit.active} ({unit.sub}){result}{ended}, {unit.enabled or 'not enabled'}{restarts}"


def _strings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
