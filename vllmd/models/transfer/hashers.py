"""Hashes files behind the threads that fetch them, from the page cache, each file in order, and finishes them.

Parts come out of order, and a resumed file begins with bytes from the disk: so the sums are made of what is in the file, not of what passes
by. While they are made, the bytes that an earlier attempt left are compared with the sums that it noted.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from vllmd.models.hashing import Digest
from vllmd.models.ioerrors import explained
from vllmd.models.transfer.checks import Sums
from vllmd.models.transfer.work import Ended, Task

CHUNK_BYTES = 1 << 20
NOTE_BYTES = 64 << 20
"""How often a sum of what is hashed so far is noted, for the next attempt."""
BEHIND_BYTES = 4 << 20
"""Less than that is not worth waking a thread, except at the end of a file."""


class Hashing:
    """The sums of one file, as far as they are made. One thread at a time (`Hashers` sees to that)."""

    def __init__(
        self,
        task: Task,
        prepare: Callable[[Task], None],
        note: Callable[[Task, int, str], None],
        doubt: Callable[[Task, int, int], None],
        *,
        is_off: bool = False,
    ) -> None:
        self.task = task
        self.is_off = is_off
        self._prepare, self._note, self._doubt = prepare, note, doubt
        self._good = 0
        self._is_begun = False

    def advance(self, buffer: memoryview, ended: Callable[[], bool]) -> None:
        """Up to what is there without a gap."""
        task = self.task
        if not self._is_begun:  # not before: thousands of files may wait, each with a descriptor and sums
            self._prepare(task)
            self.restart()
        while not ended():
            with task.lock:
                there = task.done.prefix
            count = min(there - task.hashed, len(buffer), self._next_note() - task.hashed)
            if count <= 0:
                return
            if self.is_off:
                task.hashed += count
                continue
            with explained(f"read {task.name}"):
                count = os.preadv(task.fd, [buffer[:count]], task.hashed)
            if count == 0:  # shorter than what was noted of it
                self._distrust(self._good)
                return
            self.sums.update(buffer[:count])
            task.hashed += count
            self._at_note()

    def restart(self) -> None:
        self.task.hashed = 0
        self.sums = Sums(self.task.file)
        self._good, self._good_sums = 0, self.sums.copy()
        self._is_begun = True

    def wrong(self) -> str:
        return "" if self.is_off else self.sums.wrong()

    @property
    def digest(self) -> Digest:
        return Digest() if self.is_off else self.sums.digest

    def _next_note(self) -> int:
        hashed = self.task.hashed
        regular = hashed - hashed % NOTE_BYTES + NOTE_BYTES
        return min((offset for offset in self.task.proven if offset > hashed), default=regular) if self.task.proven else regular

    def _at_note(self) -> None:
        task = self.task
        expected = task.proven.get(task.hashed, "")
        if expected:
            if self.sums.blake3 != expected:
                self._distrust(self._good)
                return
            del task.proven[task.hashed]
        elif task.hashed % NOTE_BYTES == 0:
            self._note(task, task.hashed, self.sums.blake3)
        else:
            return
        self._good, self._good_sums = task.hashed, self.sums.copy()

    def _distrust(self, good: int) -> None:
        """What an earlier attempt left beyond `good` is not what it wrote: fetched again."""
        task = self.task
        bad = max([task.hashed, *task.proven])
        task.proven.clear()
        task.hashed, self.sums = good, self._good_sums.copy()
        self._doubt(task, good, max(bad, good + 1))


class Hashers:
    """`finish(hashing)` is called once a file is fetched and hashed to its end, by the thread that hashed it."""

    def __init__(self, begin: Callable[[Task], Hashing], finish: Callable[[Hashing], None], ended: Callable[[], bool]) -> None:
        self._begin, self._finish, self._ended = begin, finish, ended
        self._changed = threading.Condition()
        self._known: dict[Task, Hashing] = {}
        self._busy: set[Task] = set()
        self._closed = False

    def add(self, task: Task) -> None:
        """From the moment that its file is open."""
        with self._changed:
            self._known.setdefault(task, self._begin(task))
            self._changed.notify()

    def came(self, task: Task) -> None:
        """More of it is there."""
        if task.done.prefix - task.hashed >= BEHIND_BYTES or task.is_fetched:
            with self._changed:
                self._changed.notify()

    def now(self, task: Task, buffer: memoryview) -> None:
        """Hash and finish it in this thread (a small file, or one that nobody hashes yet), unless another does."""
        with self._changed:
            if task in self._busy or task not in self._known:
                return
            self._busy.add(task)
        self._work(self._known[task], buffer)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self) -> None:
        """A thread's life. Ended."""
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while (hashing := self._next()) is not None:
            self._work(hashing, buffer)
        if self._ended():
            raise Ended

    def _next(self) -> Hashing | None:
        with self._changed:
            while not self._closed and not self._ended():
                hashing = max((self._known[task] for task in self._known if task not in self._busy), key=_behind, default=None)
                if hashing is not None and _behind(hashing):
                    self._busy.add(hashing.task)
                    return hashing
                self._changed.wait()
            return None

    def _work(self, hashing: Hashing, buffer: memoryview) -> None:
        task = hashing.task
        try:
            hashing.advance(buffer, self._ended)
            if task.hashed == task.file.size and task.is_fetched and not self._ended():
                self._finish(hashing)
        finally:
            with self._changed:
                self._busy.discard(task)
                if task.is_finished:
                    self._known.pop(task, None)
                elif _behind(hashing):
                    self._changed.notify()


def _behind(hashing: Hashing) -> int:
    """Bytes that wait; 0 for too few."""
    task = hashing.task
    if task.is_finished:
        return 0
    with task.lock:
        count = task.done.prefix - task.hashed
        return count + 1 if count >= BEHIND_BYTES or task.is_fetched else 0
