"""SIGTERM, SIGINT and SIGHUP as events."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from vllmd.core import events as ev

MEANING: dict[signal.Signals, ev.Event] = {
    signal.SIGTERM: ev.StopRequested("signal"),
    signal.SIGINT: ev.StopRequested("signal"),
    signal.SIGHUP: ev.ReloadRequested(),
}


def listen(post: Callable[[ev.Event], None]) -> None:
    """From now on, to the running loop."""
    loop = asyncio.get_running_loop()
    for number, event in MEANING.items():
        loop.add_signal_handler(number, post, event)
    # A storm of signals fills the loop's wake-up socket. To complain of that, CPython's C handler takes a lock which the
    # thread that it interrupts may hold: a deadlock, seen within a second of `while kill -HUP PID; do :; done`.
    signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)
