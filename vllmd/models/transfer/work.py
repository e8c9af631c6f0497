"""What is still to fetch: files cut into parts, shared out to the threads.

A thread takes its next part from a file at which nobody works, so that each file comes in order and can be hashed as it
comes; several threads share a file when there are fewer files than threads. Parts shrink towards the end of the whole, so that all threads
end together; a large part costs one round trip for many bytes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllmd.models.remote import RemoteFile
from vllmd.models.transfer.ranges import Ranges

MIN_PART_BYTES = 16 << 20
MAX_PART_BYTES = 256 << 20
PART_SHARE = 2


@dataclass(slots=True, eq=False)
class Task:
    """One file on its way. `lock` guards `done`. `proven` are the sums of an earlier attempt (offset -> BLAKE3)."""

    file: RemoteFile
    done: Ranges = field(default_factory=Ranges)
    proven: dict[int, str] = field(default_factory=dict)
    fd: int = -1
    gaps: list[tuple[int, int]] = field(default_factory=list)
    active: int = 0
    hashed: int = 0
    failures: int = 0
    location: str = ""
    whole_by: Part | None = None
    is_finished: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def is_fetched(self) -> bool:
        return self.done.prefix == self.file.size

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True)
class Part:
    """Bytes [position, end) are to come."""

    task: Task
    position: int
    end: int


class Ended(Exception):
    """Another thread failed, or the fetch was given up: there is nothing more to do."""


class Work:
    """All methods work from any thread."""

    def __init__(self, tasks: Iterable[Task], connections: int) -> None:
        self._changed = threading.Condition()
        largest_first = sorted(tasks, key=lambda task: -task.file.size)
        for task in largest_first:
            task.gaps = task.done.gaps(task.file.size)
        self._fresh = deque(task for task in largest_first if task.gaps)
        self._open: list[Task] = []
        self._all = largest_first
        self._unfinished = len(largest_first)
        self._connections = connections
        self._to_claim = sum(end - begin for task in self._fresh for begin, end in task.gaps)
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def claim(self) -> Part | None:
        """The next part, waiting while others may still leave some; None where all is fetched. Ended."""
        with self._changed:
            while True:
                if self.ended.is_set():
                    raise Ended
                if not self._unfinished:
                    return None
                if (task := self._choose()) is not None:
                    return self._cut(task)
                self._changed.wait()

    def _choose(self) -> Task | None:
        open_tasks = [task for task in self._open if task.gaps]
        least = min(open_tasks, key=lambda task: task.active, default=None)
        if self._fresh and (least is None or least.active):
            least = self._fresh.popleft()
            self._open.append(least)
        return least

    def _cut(self, task: Task) -> Part:
        begin, end = task.gaps[0]
        fair = self._to_claim // (self._connections * PART_SHARE)
        size = max(MIN_PART_BYTES, min(fair, MAX_PART_BYTES)) & ~0xFFFFF
        if end - begin > size + MIN_PART_BYTES // 2:
            task.gaps[0] = (begin + size, end)
            end = begin + size
        else:
            del task.gaps[0]
        self._to_claim -= end - begin
        task.active += 1
        return Part(task, begin, end)

    def whole(self, part: Part) -> int | None:
        """The server ignores ranges: the file comes in one piece from its beginning, and `part` becomes that piece. How many
        bytes that were there come once more; None where another thread fetches the file, and this one leaves it."""
        with self._changed, part.task.lock:
            task = part.task
            if task.is_fetched or (task.whole_by is not None and task.whole_by is not part):
                return None
            task.whole_by = part
            begin, there = task.done.prefix, task.done.bytes
            task.done.cut(begin, task.file.size)
            self._to_claim -= sum(high - low for low, high in task.gaps)
            task.gaps = []
            part.position, part.end = begin, task.file.size
            return there - begin

    def leave(self, part: Part) -> None:
        """It is done, or another thread fetches it, or the whole fetch failed."""
        with self._changed:
            part.task.active -= 1
            if part.task.whole_by is part:
                part.task.whole_by = None
            self._changed.notify_all()

    def again(self, task: Task, begin: int, end: int) -> int:
        """Bytes [begin, end), thought to be there, are to be fetched again; how many were. `task.lock` is not held."""
        with self._changed:
            with task.lock:
                before = task.done.bytes
                task.done.cut(begin, end)
                lost = before - task.done.bytes
            task.gaps.insert(0, (begin, end))
            self._to_claim += end - begin
            if task not in self._open and task not in self._fresh:
                self._open.append(task)
            self._changed.notify_all()
        return lost

    def finish(self, task: Task) -> None:
        with self._changed:
            task.is_finished = True
            task.close()
            self._unfinished -= 1
            if task in self._open:
                self._open.remove(task)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The first error ends everything."""
        with self._changed:
            if self.error is None and not isinstance(error, Ended):
                self.error = error
            self.ended.set()
            self._changed.notify_all()

    def close(self) -> None:
        """When no thread works any more."""
        for task in self._all:
            task.close()

    @property
    def is_over(self) -> bool:
        return self.ended.is_set() or not self._unfinished

    def wait(self, timeout_s: float) -> bool:
        """Until it is over."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_over, timeout_s)
