"""A finding: something that was noticed about a GPU, once, with what it means. And what an instance does about it.

Made from the kernel's log, from NVML events (core/xids.py) and from snapshots (core/gpu_conditions.py); told apart from
its repetitions, and weighed against what came before, in core/gpu_book.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vllmd.core import xids
from vllmd.core.xids import CLASSES, Class

Judgement = Literal["ignore", "journal", "restart", "quarantine"]
Detector = Literal["gpu_xid", "gpu_lost", "gpu_stuck", "gpu_ecc", "gpu_remap", "gpu_thermal", "gpu_power", "gpu_nvlink", "gpu_fabric", "gpu_pcie"]

QUARANTINE: frozenset[Class] = frozenset({"reset", "reboot", "replace"})
"""Classes for which no new start is allowed on the GPU."""
_TEXT = 400


@dataclass(frozen=True, slots=True)
class Finding:
    """`uuid` is '' where the GPU is not known, or all of them are meant (a stuck driver); `xid` 0 where it is none; `pid` 0
    where nobody knows whose work it was. `fatal`: what runs on the GPU cannot go on. `at`: seconds since 1970."""

    uuid: str
    pci: str
    detector: str
    xid: int
    cls: Class
    pid: int = 0
    process: str = ""
    fatal: bool = False
    what: str = ""
    hint: str = ""
    at: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse(words: object) -> Finding | None:
    """What came over a socket; None for what is no finding."""
    if not isinstance(words, Mapping) or words.get("cls") not in CLASSES:
        return None
    texts = {key: words.get(key, "") for key in ("uuid", "pci", "detector", "process", "what", "hint")}
    numbers = {key: words.get(key, 0) for key in ("xid", "pid")}
    at, fatal = moment(words.get("at", 0.0)), words.get("fatal", False)
    if not all(isinstance(value, str) and len(value) <= _TEXT and value.isprintable() for value in texts.values()):
        return None
    if not all(type(value) is int and 0 <= value < 1 << 31 for value in numbers.values()):
        return None
    if type(fatal) is not bool or at is None:
        return None
    return Finding(**texts, **numbers, cls=words["cls"], fatal=fatal, at=at)


def moment(value: object) -> float | None:
    """Seconds since 1970, of what came over a socket; None for what is no such time (infinity, a number that no float holds)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e11 else None


def is_same(one: Finding, other: Finding) -> bool:
    """Whether it is one finding, told by two services: of its time each has an idea of its own. The book tells the same error
    again after SAME_S (2 s) at the earliest."""
    return abs(one.at - other.at) < _SAME_S and _key(one) == _key(other)


_SAME_S = 1.0


def _key(finding: Finding) -> tuple[object, ...]:
    return (finding.uuid or finding.pci, finding.detector, finding.xid, finding.cls, finding.pid, finding.xid or finding.what)


def of_xid(
    number: int, *, uuid: str = "", pci: str = "", pid: int = 0, process: str = "", detail: str = "", at: float = 0.0
) -> Finding:
    """`detail`: the rest of the kernel's line. An NVLink5 error is fatal when its line says so."""
    row = xids.of(number)
    fatal = row.cls in QUARANTINE or number == xids.NVLINK_DOWN or (row.cls == "nvlink" and is_fatal_line(detail))
    what = f"Xid {number}: {row.what}" + (f" ({detail})" if detail else "")
    lost = number == xids.FALLEN_OFF
    return Finding(uuid, pci, "gpu_lost" if lost else "gpu_xid", number, row.cls, pid, process, fatal, what[:_TEXT], row.hint, at)


def of_recovery(action: int, *, uuid: str, pci: str, at: float) -> Finding:
    """The driver's own verdict; `action` is above 0."""
    row = xids.recovery(action)
    return Finding(uuid, pci, "gpu_xid", 0, row.cls, fatal=row.fatal, what=row.what, hint=xids.HINTS[row.cls], at=at)


_PCI = re.compile(r"(?:PCI:)?([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})(?:\.[0-9a-f])?", re.ASCII | re.IGNORECASE)


def canonical_pci(text: str) -> str:
    """One name for what the kernel writes as 0000:10:00 and NVML as 00000000:10:00.0; '' for what is none."""
    found = _PCI.fullmatch(text)
    return f"{int(found[1], 16):04x}:{found[2]}:{found[3]}.0".lower() if found else ""


def is_fatal_line(detail: str) -> bool:
    """`NVLINK: RLW Fatal, Link 05`; the driver writes Nonfatal, Non-Fatal and Non Fatal."""
    words = detail.lower().replace("non-", "non").replace("non ", "non").replace(",", " ").split()
    return "fatal" in words


def judge_for_instance(finding: Finding, our_uuids: Collection[str], our_pids_contain: bool, gpu_count: int) -> Judgement:  # noqa: FBT001 - the contract's
    """What the instance that uses these GPUs does. `our_pids_contain`: the finding's process is in the engine's cgroup.

    `restart`: end the engine, the GPU can be used again. `quarantine`: end it, and no start on this GPU until it was reset,
    the host rebooted, or a person has looked. A driver that hangs (gpu_stuck) says nothing about an engine: only the engine's
    own heartbeat does.
    """
    if finding.detector == "gpu_stuck":
        return "journal"
    if finding.uuid not in our_uuids:
        return "ignore"
    match finding.cls:
        case "reset" | "reboot" | "replace":
            return "quarantine" if finding.fatal else "journal"
        case "app":
            return "restart" if our_pids_contain else ("journal" if not finding.pid else "ignore")
        case "nvlink":
            return "restart" if finding.fatal and gpu_count > 1 else "journal"
        case "sympathetic" | "warn" | "ask" | "human":
            return "journal"
