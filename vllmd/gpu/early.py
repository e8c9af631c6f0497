"""The kernel's lines that wait for the first snapshot, which says whose GPU they are.

A storm comes in here too, and the first error of it is the one that counts: each error of a GPU has one place, and none that
forbids a start is ever pushed out by those that do not.
"""

from __future__ import annotations

from vllmd.core import xids
from vllmd.core.gpu_findings import QUARANTINE
from vllmd.gpu.kmsg import Line

MILD = 256
GRAVE = 4096


class Early:
    def __init__(self) -> None:
        self._grave: dict[tuple[object, ...], tuple[Line, float]] = {}
        self._mild: dict[tuple[object, ...], tuple[Line, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._grave or self._mild)

    def put(self, line: Line, written: float) -> None:
        """Of those that are alike the first one stays. Of the mild ones the oldest goes when there are too many."""
        if line.action or xids.of(line.xid).cls in QUARANTINE:
            if len(self._grave) < GRAVE:
                self._grave.setdefault((line.pci, line.xid, line.action), (line, written))
            return
        self._mild.setdefault((line.pci, line.xid, line.pid), (line, written))
        if len(self._mild) > MILD:
            del self._mild[next(iter(self._mild))]

    def take(self) -> list[tuple[Line, float]]:
        """All of them, by their time."""
        found = sorted((*self._grave.values(), *self._mild.values()), key=lambda each: each[1])
        self._grave, self._mild = {}, {}
        return found
