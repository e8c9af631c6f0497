"""Blocking work beside the loop, in a thread that nobody waits for: not a cancelled caller, and not the interpreter's end.

asyncio.to_thread will not do: its executor is joined at exit, so one call that hangs in a driver would hold the exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


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

    threading.Thread(target=run, daemon=True, name="vllmd-blocking").start()
    return await future
