"""Blocking work beside the loop, in a thread that nobody waits for: not a cancelled caller, and not the interpreter's end.

asyncio.to_thread will not do: its executor is joined at exit, so one call that hangs in a driver would hold the exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_spare: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_kept = threading.Event()


def keep_spare() -> None:
    """One thread for the hour in which no other can be started: a fork bomb in the engine fills the unit's TasksMax=, which
    is ours as well, and just then a failure is to be examined. It does one thing after another."""
    if not _kept.is_set():
        threading.Thread(target=_work_on_spare, daemon=True, name="vllmd-spare").start()
        _kept.set()


def _work_on_spare() -> None:
    while True:
        _spare.get()()


async def in_thread(work: Callable[[], T]) -> T:
    """The result of `work`, or its exception. Cancelling abandons it; its result is then dropped."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: the daemon has left
            loop.call_soon_threadsafe(settle, result, error)

    try:
        threading.Thread(target=run, daemon=True, name="vllmd-blocking").start()
    except RuntimeError:
        if not _kept.is_set():
            raise
        _spare.put(run)
    return await future
