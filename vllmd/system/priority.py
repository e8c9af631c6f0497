"""The supervisor's share of the CPU.

A vLLM on CPUs keeps a thread busy for each core and more; where no control group tells them apart, the one thread that
watches got a 24th of a core beside them: its verdict on a hang came two seconds late, its evidence after four. Where the
kernel shares the CPU by session (autogroup: no unit with a CPU controller around us), nice counts within the session only, and
the session has one of its own.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

WATCHING_NICE = -10
AUTOGROUP = Path("/proc/self/autogroup")


def prefer_us() -> None:
    """This process before those that compute. Nothing where we may not: the unit then has done it (Nice=). Nor where somebody
    gave it less on purpose."""
    if WATCHING_NICE < _nice() <= 0:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, WATCHING_NICE)
            if os.getsid(0) == os.getpid():  # else it is a terminal's, and others' as well
                AUTOGROUP.write_text(str(WATCHING_NICE))


def as_others() -> None:
    """A child of ours that works rather than watches: no more than anybody's. Who was given less keeps that."""
    if _nice() < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)


def _nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)
