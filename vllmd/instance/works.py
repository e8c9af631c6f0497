"""What the daemon does beside its loop: tasks by name, of which each runs once at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Works:
    """`failed` is told what a work raised, by its name."""

    def __init__(self, failed: Callable[[str, Exception], None]) -> None:
        self._failed = failed
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """In the place of what has this name already."""
        self.cancel(name)
        task = self._tasks[name] = asyncio.create_task(self._guarded(name, work), name=name)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step: nobody awaits `work` then

    def cancel(self, *names: str) -> None:
        for name in names:
            task = self._tasks.pop(name, None)
            if task is not None:
                task.cancel()

    def cancel_all(self) -> None:
        self.cancel(*list(self._tasks))

    async def end_all_but(self, *names: str) -> None:
        """Cancels the others and waits for them: a launch that is cut must first end what it started."""
        tasks = [self._tasks.pop(name) for name in list(self._tasks) if name not in names]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _guarded(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._failed(name, error)
