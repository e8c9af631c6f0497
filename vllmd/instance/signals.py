"""What signals mean, as events: SIGTERM, Ctrl-C and Ctrl-\\ stop, SIGHUP reads the configuration again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from vllmd.core import events as ev

STOP = ev.StopRequested("signal")
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED = (signal.SIGUSR1, signal.SIGUSR2)
"""Other daemons reopen their logs on them, and many a logrotate script sends them to everybody: their default is death."""


def listen(post: Callable[[ev.Event], None]) -> None:
    """From now on, to the running loop."""
    loop = asyncio.get_running_loop()
    for number in STOPPING:
        loop.add_signal_handler(number, post, STOP)
    # `nohup` says so by ignoring SIGHUP: then the terminal may go.
    attended = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and _has_terminal()
    loop.add_signal_handler(
        signal.SIGHUP, lambda: post(STOP if attended and not _has_terminal() else ev.ReloadRequested())
    )
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # A storm of signals fills the loop's wake-up socket. To complain of that, CPython's C handler takes a lock which the
    # thread that it interrupts may hold: a deadlock, seen within a second of `while kill -HUP PID; do :; done`.
    signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)


def deafen() -> None:
    """At the very end: nothing is stopped or read again any more. The loop would set them back to what kills, and a death by
    SIGHUP, SIGINT or SIGTERM is a clean end for systemd: `Restart=on-failure` would not restart what has failed."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGHUP, *STOPPING):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


def _has_terminal() -> bool:
    """Whether a person may be at it: a controlling terminal that has not hung up. SIGHUP says that it has, too, and an engine
    that nobody sees any more must not go on holding the GPU."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True
