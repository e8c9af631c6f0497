"""`vllmctl pause|resume`: asks the supervisor itself, on its control socket, not to judge its engine for a while."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

from vllmd import ctl_unit as units
from vllmd.config.paths import Paths
from vllmd.errors import PermissionMissing, TryLater, UsageError, VllmdError
from vllmd.system.unixpath import short

TIMEOUT_S = 10.0
_UNITS = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def pause(paths: Paths, name: str, *, for_text: str, why: str) -> int:
    name = units.instance_name(name)
    answer = _post(paths, name, "/pause", {"for_s": seconds(for_text), "why": why})
    until = answer.get("paused", {}).get("until", "")
    sys.stdout.write(f"{name} is paused until {until}: nothing is judged. `vllmctl resume {name}` ends it.\n")
    return 0


def resume(paths: Paths, name: str) -> int:
    name = units.instance_name(name)
    _post(paths, name, "/resume", {})
    sys.stdout.write(f"{name} is watched again\n")
    return 0


def seconds(text: str) -> float:
    """90, 90s, 10min, 1.5h, 2d."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(s|min|m|h|d|)", text.strip(), re.ASCII)
    if not found or not float(found[1]):
        raise UsageError("duration", f"{text!r} is no duration", "write 90, 10min, 1h or 2d")
    return float(found[1]) * _UNITS[found[2]]


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        with short(self._path) as address:
            self.sock.connect(address)


def _post(paths: Paths, name: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    where = paths.instance_runtime(name) / "control.sock"
    try:
        with contextlib.closing(_Connection(where)) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            status, text = answer.status, answer.read(1 << 16).decode(errors="replace").strip()
    except PermissionError:
        raise PermissionMissing("control_socket_refused", f"you may not speak to the supervisor of {name} ({where})", _BE_ADMIN) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise TryLater("not_running", f"{name} has no running supervisor ({where})", f"vllmctl status {name}") from None
    except (OSError, http.client.HTTPException) as error:
        raise TryLater("control_socket_failed", f"the supervisor of {name} does not answer: {error}", f"vllmctl status {name}") from None
    return _answer(name, status, text)


_BE_ADMIN = "as root, or as a member of the group vllmd-admin"


def _answer(name: str, status: int, text: str) -> dict[str, Any]:
    if status == 403:
        raise PermissionMissing("not_allowed", f"you may not pause {name}: {text}", _BE_ADMIN)
    try:
        document = json.loads(text)
    except ValueError:
        document = {}
    document = document if isinstance(document, dict) else {}
    if status == 200:
        return document
    reason = document.get("error") or text or f"status {status}"
    kind: type[VllmdError] = UsageError if status == 400 else TryLater
    raise kind("pause_refused", f"{name}: {reason}", f"vllmctl status {name}")
