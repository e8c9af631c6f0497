"""`vllmctl pause|resume`: asks the supervisor itself, on its control socket, not to judge its engine for a while."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.ctl import control
from vllmd.ctl import unit as units
from vllmd.ctl.files import text
from vllmd.errors import PermissionMissing, TryLater, UsageError, VllmdError

_UNITS = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def pause(paths: Paths, name: str, *, for_text: str, why: str, as_json: bool = False) -> int:
    name = units.instance_name(name)
    answer = _post(paths, name, "/pause", {"for_s": seconds(for_text), "why": why})
    if as_json:
        return _print(name, answer.get("paused"))
    until = text(answer, "paused", "until")
    sys.stdout.write(printable(f"{name} is paused until {until}: nothing is judged. `vllmctl resume {name}` ends it.") + "\n")
    return 0


def resume(paths: Paths, name: str, *, as_json: bool = False) -> int:
    name = units.instance_name(name)
    _post(paths, name, "/resume", {})
    if as_json:
        return _print(name, None)
    sys.stdout.write(f"{name} is watched again\n")
    return 0


def _print(name: str, paused: Any) -> int:
    sys.stdout.write(json.dumps({"schema": 1, "instance": name, "paused": paused}) + "\n")
    return 0


def seconds(text: str) -> float:
    """90, 90s, 10min, 1.5h, 2d."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(s|min|m|h|d|)", text.strip(), re.ASCII)
    if not found or not float(found[1]):
        raise UsageError("duration", f"{text!r} is no duration", "write 90, 10min, 1h or 2d")
    return float(found[1]) * _UNITS[found[2]]


def _post(paths: Paths, name: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return _answer(name, *control.ask(paths, name, "POST", path, body))


def _answer(name: str, status: int, text: str) -> dict[str, Any]:
    if status == 403:
        raise PermissionMissing("not_allowed", f"you may not pause {name}: {text}", control.BE_ADMIN)
    document = control.decoded(text)
    if status == 200:
        return document
    reason = document.get("error") or text or f"status {status}"
    kind: type[VllmdError] = UsageError if status == 400 else TryLater
    raise kind("pause_refused", f"{name}: {reason}", f"vllmctl status {name}")
