"""Pure: which bytes of a file are there."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """Half-open ranges [begin, end) of offsets, merged and sorted."""

    __slots__ = ("_begins", "_ends")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, end in ranges:
            self.add(begin, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._begins, self._ends, strict=True)

    @property
    def bytes(self) -> int:
        return sum(self._ends) - sum(self._begins)

    @property
    def prefix(self) -> int:
        """How many bytes are there from the beginning on without a gap."""
        return self._ends[0] if self._begins and self._begins[0] == 0 else 0

    def add(self, begin: int, end: int) -> None:
        if begin >= end:
            return
        first = bisect_left(self._ends, begin)
        last = bisect_right(self._begins, end)
        if first < last:
            begin = min(begin, self._begins[first])
            end = max(end, self._ends[last - 1])
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]

    def cut(self, begin: int, end: int) -> None:
        """Take [begin, end) out."""
        rest = [piece for low, high in self for piece in ((low, min(high, begin)), (max(low, end), high)) if piece[0] < piece[1]]
        self._begins = [low for low, _ in rest]
        self._ends = [high for _, high in rest]

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """What of [0, size) is not there."""
        edges = [0, *(edge for piece in self for edge in piece), size]
        return [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=True) if low < high]
