"""What vllmd needs of its unit: a row for each setting that a drop-in could undo. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from vllmd.ctl.doctor.finding import Severity

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "month": 2629800.0, "y": 31557600.0}
_SPAN = re.compile(r"([\d.]+)\s*(us|ms|s|min|h|d|w|month|y)?")
_UNLIMITED = float("inf")


def seconds(text: str) -> float:
    """A time span as `systemctl show` writes it: '1min 30s', 'infinity', '0'."""
    if text == "infinity":
        return _UNLIMITED
    return sum(float(number) * _UNITS_S[unit or "us"] for number, unit in _SPAN.findall(text))


def amount(text: str) -> float:
    """A limit: 'infinity' or a number."""
    return float(text) if text.isdecimal() and int(text) < 2**63 else _UNLIMITED


@dataclass(frozen=True, slots=True)
class Rule:
    """`key` as `systemctl show` says it; `is_good` of its value; `wanted` the line for a drop-in; `why` what goes wrong else."""

    key: str
    is_good: Callable[[str], bool]
    wanted: str
    why: str
    severity: Severity = "error"


def _one_of(*values: str) -> Callable[[str], bool]:
    return lambda value: value in ("", *values)  # '': this systemd does not know it


def _at_least(low: float, read: Callable[[str], float]) -> Callable[[str], bool]:
    return lambda value: not value or read(value) >= low


def _has(*words: str) -> Callable[[str], bool]:
    return lambda value: all(word in value.split() for word in words)


RULES = (
    Rule("Type", _one_of("notify", "notify-reload"), "Type=notify", "a start does not wait until the model answers"),
    Rule("NotifyAccess", _one_of("main", "exec", "all"), "NotifyAccess=main", "systemd does not hear that the instance is ready"),
    Rule("Delegate", _one_of("yes"), "Delegate=yes", "the engine gets no control group of its own, so its processes cannot be ended for certain"),
    Rule("KillMode", _one_of("mixed", "control-group"), "KillMode=mixed", "what the supervisor leaves is not ended, and keeps port and GPU memory"),
    Rule("KillSignal", _one_of("15"), "KillSignal=SIGTERM", "the supervisor is not told to stop in order"),
    Rule("SendSIGKILL", _one_of("yes"), "SendSIGKILL=yes", "what does not end is left running"),
    Rule("Restart", _one_of("on-failure", "always"), "Restart=on-failure", "an engine that dies is not started again"),
    Rule(
        "RestartPreventExitStatus", _has("2", "3", "64", "65", "69", "77", "78"), "RestartPreventExitStatus=2 3 64 65 69 77 78",
        "what only a person can mend is started again and again", "warning",
    ),
    Rule("TimeoutStartUSec", _at_least(30, seconds), "TimeoutStartSec=90", "the start is killed before the supervisor can ask for more time"),
    Rule("TimeoutStopUSec", _at_least(30, seconds), "TimeoutStopSec=90", "a stop is killed before the engine has ended in order"),
    Rule("RuntimeMaxUSec", _one_of("infinity"), "RuntimeMaxSec=infinity", "systemd ends the instance after this time"),
    Rule("OOMPolicy", _one_of("continue"), "OOMPolicy=continue", "a process that runs out of memory ends the supervisor before it can say so", "warning"),
    Rule("ProtectControlGroups", _one_of("no"), "ProtectControlGroups=no", "the delegated control group is read-only"),
    Rule("PrivateDevices", _one_of("no"), "PrivateDevices=no", "the GPUs are hidden"),
    Rule("PrivateNetwork", _one_of("no"), "PrivateNetwork=no", "no client can connect"),
    Rule("PrivateUsers", _one_of("no"), "PrivateUsers=no", "listeners of other users look like nobody's, and groups of devices are lost", "warning"),
    Rule("MemoryDenyWriteExecute", _one_of("no"), "MemoryDenyWriteExecute=no", "compilers at run time (torch, Triton) fail"),
    Rule("ProtectProc", _one_of("default"), "ProtectProc=default", "nobody can be named who holds a port or a GPU", "warning"),
    Rule("ProcSubset", _one_of("all"), "ProcSubset=all", "/proc/meminfo and /proc/driver are hidden"),
    Rule("LimitMEMLOCK", _at_least(1 << 30, amount), "LimitMEMLOCK=infinity", "memory cannot be pinned for GPUs and RDMA"),
    Rule("LimitNOFILE", _at_least(65536, amount), "LimitNOFILE=524288", "each connection needs a descriptor, and so does each file of the model"),
    Rule("TasksMax", _at_least(4096, amount), "TasksMax=infinity", "an engine has thousands of threads on a large host"),
    Rule("LogRateLimitIntervalUSec", _one_of("0"), "LogRateLimitIntervalSec=0", "journald drops events of the supervisor in a flood of the engine's lines", "warning"),
    Rule("PrivateTmp", _one_of("yes", "disconnected"), "PrivateTmp=yes", "what vLLM leaves in /tmp stays", "warning"),
    Rule("TemporaryFileSystem", lambda value: "/dev/shm" in value, "TemporaryFileSystem=/dev/shm:mode=1777,size=50%", "what vLLM leaves in /dev/shm stays, and takes memory", "warning"),
)  # fmt: skip
WRITTEN_AS = {
    "TimeoutStartUSec": ("TimeoutStartSec", "TimeoutSec"),
    "TimeoutStopUSec": ("TimeoutStopSec", "TimeoutSec"),
    "RuntimeMaxUSec": ("RuntimeMaxSec",),
    "LogRateLimitIntervalUSec": ("LogRateLimitIntervalSec",),
}
"""Names of a setting in files, where they differ from `systemctl show`."""
