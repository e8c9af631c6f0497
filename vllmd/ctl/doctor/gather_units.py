"""What systemd says of the units: their settings as they are in force, and the lines of their files that say so."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence

from vllmd.config.paths import Paths
from vllmd.ctl import unit as units
from vllmd.ctl.doctor.facts import Line, SystemdFacts, UnitFacts
from vllmd.ctl.doctor.rules import RULES, WRITTEN_AS

COPIED = (
    "User", "Group", "SupplementaryGroups", "DevicePolicy", "DeviceAllow", "PrivateDevices", "ProtectSystem", "ProtectHome", "ReadWritePaths", "ReadOnlyPaths",
    "InaccessiblePaths", "TemporaryFileSystem", "PrivateTmp", "NoNewPrivileges", "PrivateNetwork", "ProtectControlGroups", "ProtectKernelTunables", "Delegate",
    "LimitMEMLOCK", "LimitNOFILE", "TasksMax", "CapabilityBoundingSet", "PrivateUsers",
)  # fmt: skip
"""What makes the inside of a unit: gather_inside gives it to a unit of its own."""
_STATE = (
    "Id", "LoadState", "ActiveState", "SubState", "Result", "UnitFileState", "NeedDaemonReload", "FragmentPath", "DropInPaths", "NRestarts", "MainPID",
)  # fmt: skip
_TIMEOUT_S = 10.0


def look(paths: Paths, wanted: Sequence[str]) -> SystemdFacts:
    """Of these instances, or of every one that systemd knows. VllmdError where it does not answer."""
    scope = ("--user",) if paths.scope == "user" else ()
    names = tuple(wanted) or tuple(units.Systemd(paths.scope).names())
    chosen = [*map(units.unit, names), *(() if scope else (units.GPU_WATCH, units.TARGET))]
    keys = dict.fromkeys((*_STATE, *COPIED, *(rule.key for rule in RULES)))
    shown = _call(*scope, "show", "-p", ",".join(keys), *chosen) if chosen else ""
    found = [_unit(block) for block in shown.split("\n\n") if block.strip()]
    version = re.match(r"systemd (\d+)", _call("--version"))
    return SystemdFacts(int(version[1]) if version else 0, dict(zip(chosen, found, strict=False)), names)


def known(paths: Paths) -> tuple[str, ...]:
    """Instances that systemd knows, whether they have a file or not."""
    return tuple(units.Systemd(paths.scope).names())


def _call(*words: str) -> str:
    argv = ["systemctl", "--no-pager", *words]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False).stdout


def _unit(block: str) -> UnitFacts:
    values: dict[str, str] = {}
    for line in block.splitlines():
        key, equals, value = line.partition("=")
        if equals:
            values[key] = f"{values[key]}\n{value}" if values.get(key) else value
    return UnitFacts(values, tuple(_lines(values)))


def _lines(values: dict[str, str]) -> Iterator[Line]:
    """Where the settings that count are written."""
    keys = {name for rule in RULES for name in WRITTEN_AS.get(rule.key, (rule.key,))}
    for path in filter(None, (values.get("FragmentPath", ""), *values.get("DropInPaths", "").split())):
        try:
            with open(path, encoding="utf-8", errors="replace") as text:
                for number, line in enumerate(text, 1):
                    key = line.partition("=")[0].strip()
                    if key in keys:
                        yield Line(path, number, key, path != values.get("FragmentPath"))
        except OSError:
            continue
