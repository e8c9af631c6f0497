"""The table: one row a figure, with its samples, its bar, and what it is compared with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HEAD = ("figure", "median", "p99", "n", "bar", "", "compared with (median)")


@dataclass(frozen=True, slots=True)
class Figure:
    """One row. `samples` are in `unit`; `bar` is the most that `judged` (median or p99) may be, or the least with `at_least`,
    None where nothing was promised; `against` is what stands in the last column; `missing` says why there are no samples."""

    what: str
    samples: Sequence[float] = ()
    unit: str = "s"
    bar: float | None = None
    judged: str = "median"
    against: str = ""
    missing: str = ""
    at_least: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p99(self) -> float:
        """The nearest rank: of fewer than 100 samples, the largest."""
        ordered = sorted(self.samples)
        return ordered[math.ceil(0.99 * len(ordered)) - 1]

    @property
    def verdict(self) -> str:
        if self.bar is None or not self.samples:
            return ""
        value = self.p99 if self.judged == "p99" else self.median
        if self.at_least:
            return "ok" if value >= self.bar else "UNDER"
        return "ok" if value <= self.bar else "OVER"

    def cells(self) -> tuple[str, ...]:
        if not self.samples:
            return (self.what, "-", "-", "0", self._bar(), "", self.missing)
        spread = self.show(self.p99) if len(self.samples) > 1 else "-"
        return (self.what, self.show(self.median), spread, str(len(self.samples)), self._bar(), self.verdict, self.against)

    def _bar(self) -> str:
        if self.bar is None:
            return ""
        return f"{'>=' if self.at_least else '<='} {self.bar:g} {self.unit}" + (" p99" if self.judged == "p99" else "")

    def show(self, value: float) -> str:
        digits = {"s": 3, "ms": 3, "MiB": 1, "%": 3}.get(self.unit, 2)
        return f"{value:.{digits}f} {self.unit}"


def compared(what: str, samples: Sequence[float], unit: str = "s") -> str:
    """The last column: what else was measured in the same run."""
    return f"{what}: {Figure(what, samples, unit).show(statistics.median(samples))}" if samples else f"{what}: not measured"


def render(figures: Iterable[Figure]) -> str:
    rows = [HEAD, *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = []
    for row in rows:
        words = [text.rjust(width) if 0 < column < 5 else text.ljust(width) for column, (text, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(words).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
