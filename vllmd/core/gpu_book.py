"""What is remembered of the GPUs: which finding was told already, which errors came together, what each GPU's verdict is.

The clock is given (`at`, seconds that only grow); what is remembered is bounded, also when a driver reports 800,000 errors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vllmd.config.settings import GpuWatch
from vllmd.core import gpu_conditions, xids
from vllmd.core.gpu_conditions import Condition, text
from vllmd.core.gpu_findings import QUARANTINE, Finding
from vllmd.core.xids import HINTS

SAME_S = 2.0
"""The kernel's log and NVML tell of one error within this time."""
WINDOW_S = 3600.0
HOLD_S = 60.0
"""A condition that comes and goes faster than this is one."""
_PIDS = 8
_REMEMBERED = 4096
_SUSPECT = "Run `dcgmi diag -r 3`, and move the instance to another GPU meanwhile."

VerdictClass = Literal["ok", "warn", "suspect", "reset", "reboot", "replace", "lost"]
_ORDER: tuple[VerdictClass, ...] = ("ok", "warn", "suspect", "reset", "reboot", "replace", "lost")
_WORST: Mapping[str, VerdictClass] = {
    "app": "ok", "sympathetic": "ok", "ask": "ok", "human": "warn", "warn": "warn", "nvlink": "warn", "reset": "reset", "reboot": "reboot", "replace": "replace",
}  # fmt: skip


@dataclass(slots=True)
class _Told:
    """One error of one GPU: when it was last told, and of which processes since."""

    at: float
    pids: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Held:
    condition: Condition
    last_at: float
    is_here: bool = True


@dataclass(slots=True)
class Book:
    limits: GpuWatch = field(default_factory=GpuWatch)
    repeated: int = 0
    """Findings that were one of those already told."""
    _told: dict[tuple[str, int], _Told] = field(default_factory=dict)
    _apps: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)
    _timeouts: dict[str, tuple[float, bool]] = field(default_factory=dict)
    _suspect: dict[str, float] = field(default_factory=dict)
    _held: dict[str, dict[str, _Held]] = field(default_factory=dict)
    _before: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _before_at: float = 0.0

    # -- errors, one by one

    def is_told(self, gpu: str, number: int, pid: int, at: float) -> bool:
        """The same, asked first and cheaply: most lines of a storm end here."""
        told = self._told.get((gpu, number))
        if told is None or at - told.at >= SAME_S or (pid and pid not in told.pids and len(told.pids) < _PIDS):
            return False
        self.repeated += 1
        return True

    def xid(self, finding: Finding, at: float) -> list[Finding]:
        """What is to be told of it: nothing where it was told within SAME_S, unless it now has a process that it had not. With
        what it makes of those before it, behind it."""
        is_new = self._is_new(finding, at)
        if is_new is None:
            self.repeated += 1
            return []
        told = self._as_repeated(finding, at, is_new=is_new)
        return [*([told] if is_new or finding.pid else []), *self._suspects(told, at, is_new=is_new)]

    def _is_new(self, finding: Finding, at: float) -> bool | None:
        """True: told now for the first time. False: known (by NVML, which names no process), and now with its process. None: known."""
        key = (finding.uuid or finding.pci, finding.xid)
        told = self._told.get(key)
        if told is None or at - told.at >= SAME_S:
            if len(self._told) >= _REMEMBERED:
                self._told = {each: known for each, known in self._told.items() if at - known.at < SAME_S}
            self._told[key] = _Told(at, {finding.pid} - {0})
            return True
        if not finding.pid or finding.pid in told.pids or len(told.pids) >= _PIDS:
            return None
        is_other = bool(told.pids)
        told.pids.add(finding.pid)
        return is_other

    def _as_repeated(self, finding: Finding, at: float, *, is_new: bool) -> Finding:
        """Xid 109: the first one within an hour costs the engine, the second one the GPU."""
        if finding.xid != xids.CONTEXT_SWITCH_TIMEOUT:
            return finding
        gpu = finding.uuid or finding.pci
        last, is_again = self._timeouts.get(gpu, (-WINDOW_S, False))
        if is_new:
            is_again = at - last < WINDOW_S
            self._timeouts[gpu] = (at, is_again)
        return finding if is_again else replace(finding, cls="app", fatal=False, hint=HINTS["app"])

    def _suspects(self, finding: Finding, at: float, *, is_new: bool) -> Iterator[Finding]:
        """Of one engine it is the engine's fault; of two, on one GPU, perhaps the GPU's."""
        if finding.cls != "app":
            return
        gpu = finding.uuid or finding.pci
        seen = self._apps.setdefault(gpu, deque(maxlen=64))
        if not is_new and seen:
            seen.pop()  # it is known by now whose it was
        seen.append((at, finding.pid))
        recent = [pid for when, pid in seen if at - when < WINDOW_S]
        processes = len(set(recent) - {0})
        if len(recent) < self.limits.suspect_xids or processes < 2:
            return
        was, self._suspect[gpu] = self._suspect.get(gpu, -WINDOW_S), at
        if at - was >= WINDOW_S:
            what = f"{len(recent)} errors of applications within an hour, in {processes} processes: the GPU itself is suspect"
            yield replace(finding, xid=0, cls="human", pid=0, process="", fatal=False, what=what, hint=_SUSPECT)

    # -- snapshots

    def snapshot(self, gpus: Sequence[Mapping[str, Any]], at: float, wall: float) -> list[Finding]:
        """What holds now and did not before. `wall`: the time that the findings bear."""
        found = []
        for gpu in gpus:
            name = text(gpu, "uuid") or text(gpu, "pci") or str(gpu.get("index"))
            held = self._held.setdefault(name, {})
            for each in held.values():
                each.is_here = False
            for condition in gpu_conditions.conditions(gpu, self._before.get(name, {}), at - self._before_at, self.limits):
                known = held.get(condition.key)
                held[condition.key] = _Held(condition, at)
                if known is None:
                    found.append(condition.finding(gpu, wall))
            self._held[name] = {key: each for key, each in held.items() if each.is_here or (each.condition.cls not in QUARANTINE and at - each.last_at < HOLD_S)}
            self._before[name] = gpu
        self._before_at = at
        return found

    def recovery(self, gpu: Mapping[str, Any], at: float, wall: float) -> list[Finding]:
        """The driver's own verdict, where the kernel's log tells it before a snapshot does. `gpu`: uuid, pci, recovery_action."""
        held = self._held.setdefault(text(gpu, "uuid") or text(gpu, "pci"), {})
        new = [each for each in gpu_conditions.conditions(gpu, {}, 0.0, self.limits) if each.key not in held]
        held.update({each.key: _Held(each, at) for each in new})
        return [each.finding(gpu, wall) for each in new]

    def forget(self, uuid: str) -> None:
        """A person has cleared the GPU: what holds of it is told anew."""
        self._held.pop(uuid, None)
        self._suspect.pop(uuid, None)
        self._apps.pop(uuid, None)

    def verdict(self, gpu: Mapping[str, Any], quarantined: tuple[str, str, str] | None, at: float) -> dict[str, str]:
        """`class`, `what`, `hint`: the worst of what holds. `quarantined`: the same three of its record."""
        name = text(gpu, "uuid") or text(gpu, "pci") or str(gpu.get("index"))
        known: list[tuple[VerdictClass, str, str]] = [("ok", "", "")]
        known += [_as_verdict(each.condition) for each in self._held.get(name, {}).values()]
        if at - self._suspect.get(name, -WINDOW_S) < WINDOW_S:
            known.append(("suspect", "errors of several processes within an hour", _SUSPECT))
        if quarantined is not None:
            known.append((_WORST.get(quarantined[0], "replace"), *quarantined[1:]))
        worst = max(known, key=lambda each: _ORDER.index(each[0]))
        return dict(zip(("class", "what", "hint"), worst, strict=True))


def _as_verdict(condition: Condition) -> tuple[VerdictClass, str, str]:
    return ("lost" if condition.key == "lost" else _WORST[condition.cls]), condition.what, condition.hint or HINTS[condition.cls]
