"""What systemd knows of an instance's unit, and what it is asked to do with it: systemctl as a subprocess.

No D-Bus library: systemctl speaks to whatever systemd there is, asks polkit by itself, and is what the operator would
have typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllmd.config.paths import Paths
from vllmd.errors import PermissionMissing, TryLater, UsageError, VllmdError

GPU_WATCH = "vllmd-gpu.service"
TARGET = "vllmd.target"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}")
_PROPERTIES = (
    "LoadState,ActiveState,SubState,Result,ExecMainCode,ExecMainStatus,MainPID,NRestarts,StateChangeTimestamp,"
    "MemoryCurrent,UnitFileState,Job,StatusText,InvocationID"
)
_CALL_TIMEOUT_S = 30.0
_NOT_SET = 2**64 - 1


def instance_name(text: str) -> str:
    """NAME out of NAME, vllmd@NAME or vllmd@NAME.service; raises UsageError."""
    name = text.removeprefix("vllmd@").removesuffix(".service")
    if not _NAME.fullmatch(name) or name in ("vllmd", "presets") or name.endswith(".d"):
        raise UsageError("instance_name", f"{text!r} is no name of an instance", "lower-case letters, digits, dots, dashes and underscores, at most 48")
    return name


@dataclass(frozen=True, slots=True)
class UnitState:
    """The unit as `systemctl show` has it. `exited` says whether its last main process ended by itself, with
    `exit_status`; `memory_bytes` is None where it is not accounted; `has_job`: a start or stop is under way."""

    load: str = ""
    active: str = ""
    sub: str = ""
    result: str = ""
    exited: bool = False
    exit_status: int = 0
    main_pid: int = 0
    restarts: int = 0
    changed: str = ""
    memory_bytes: int | None = None
    enabled: str = ""
    has_job: bool = False
    text: str = ""
    invocation: str = ""

    @property
    def exists(self) -> bool:
        return self.load == "loaded"


def parse_show(text: str) -> UnitState:
    """From the KEY=VALUE lines of `systemctl show`."""
    values = dict(line.partition("=")[::2] for line in text.splitlines())
    memory = _number(values, "MemoryCurrent", _NOT_SET)
    return UnitState(
        load=values.get("LoadState", ""),
        active=values.get("ActiveState", ""),
        sub=values.get("SubState", ""),
        result=values.get("Result", ""),
        exited=_number(values, "ExecMainCode", 0) == 1,  # CLD_EXITED
        exit_status=_number(values, "ExecMainStatus", 0),
        main_pid=_number(values, "MainPID", 0),
        restarts=_number(values, "NRestarts", 0),
        changed=values.get("StateChangeTimestamp", ""),
        memory_bytes=None if memory >= _NOT_SET else memory,
        enabled=values.get("UnitFileState", ""),
        has_job=_number(values, "Job", 0) != 0,
        text=values.get("StatusText", ""),
        invocation=values.get("InvocationID", ""),
    )


def _number(values: Mapping[str, str], key: str, default: int) -> int:
    text = values.get(key, "")
    return int(text) if text.isascii() and text.isdigit() else default


class Systemd:
    """The systemd of the system, or of the user."""

    def __init__(self, scope: str) -> None:
        self._scope = ("--user",) if scope == "user" else ()
        self.prefix = "vllmctl --user" if scope == "user" else "vllmctl"

    def show(self, name: str) -> UnitState:
        return parse_show(self._call("show", "-p", _PROPERTIES, unit(name)))

    def show_all(self, names: Sequence[str]) -> dict[str, UnitState]:
        """All at once: a call for each would take longer than all the rest."""
        if not names:
            return {}
        shown = self._call("show", "-p", _PROPERTIES, *map(unit, names)).split("\n\n")
        return {name: parse_show(text) for name, text in zip(names, shown, strict=False)}

    def names(self) -> list[str]:
        """Instances whose unit is loaded or enabled."""
        listed = self._call("list-units", "--all", "--plain", "--no-legend", "vllmd@*.service")
        listed += self._call("list-unit-files", "--plain", "--no-legend", "vllmd@*.service")
        first_words = [line.split()[0] for line in listed.splitlines() if line.strip()]
        names = {word.removeprefix("vllmd@").removesuffix(".service") for word in first_words}
        return sorted(name for name in names if _NAME.fullmatch(name))

    def submit(self, verb: str, name: str) -> None:
        """Asks for a start, restart or stop and returns at once."""
        self._call(verb, "--no-block", "--", unit(name))

    def forgive(self, name: str) -> None:
        """Forgets failed starts: an operator who says start has looked at them."""
        self._call("reset-failed", "--", unit(name))

    def _call(self, *words: str) -> str:
        import subprocess  # a health check that asks no systemd does not pay for it

        argv = ["systemctl", *self._scope, "--no-pager", "--no-ask-password", *words]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_CALL_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
        except FileNotFoundError:
            raise no_systemd() from None
        except subprocess.TimeoutExpired:
            raise TryLater("systemd_silent", f"systemctl {words[0]} did not answer within {_CALL_TIMEOUT_S:.0f} s", "is systemd itself well? systemctl status") from None
        if done.returncode != 0 and done.stderr.strip():
            raise self._refused(words, done.stderr.strip().splitlines()[0])
        return done.stdout

    def _refused(self, words: tuple[str, ...], said: str) -> VllmdError:
        if re.search(r"Access denied|authentication|Permission denied|not permitted", said, re.IGNORECASE):
            return PermissionMissing("not_permitted", f"systemctl {words[0]}: {said}", f"sudo {self.prefix} {words[0]} {words[-1].removeprefix('vllmd@').removesuffix('.service')}")
        if "connect to bus" in said:
            return UsageError("no_user_systemd", f"systemctl: {said}", "is a systemd of this user running? log in as the user, or loginctl enable-linger USER")
        if "not found" in said:
            return UsageError("unit_not_found", f"systemctl {words[0]}: {said}", "is the unit vllmd@.service installed? systemctl cat vllmd@.service")
        return VllmdError("systemctl_failed", f"systemctl {words[0]}: {said}", "systemctl status vllmd@NAME shows more")


def unit(name: str) -> str:
    return f"vllmd@{name}.service"


def runs(scope: str) -> bool:
    """Whether a systemd answers here that could have units of this scope."""
    return scope != "root" and Path("/run/systemd/system").is_dir()


def need_systemd(paths: Paths) -> Systemd:
    """The systemd to talk to; raises VllmdError where there is none, with what to do instead."""
    if paths.scope == "root":
        raise UsageError("no_unit", "instances under --root are run by hand, not by systemd", f"vllmd --root {paths.config.parent} run NAME; Ctrl-C ends it")
    if not runs(paths.scope):
        raise no_systemd()
    return Systemd(paths.scope)


def no_systemd() -> VllmdError:
    return UsageError("no_systemd", "systemd does not run here, so there are no units", "run the instance in the foreground: vllmd run NAME")
