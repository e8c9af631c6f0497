"""The supervisor's share of the CPU.

A vLLM on CPUs keeps a thread busy for each core and more; where no control group tells them apart, the one thread that
watches got a 24th of a core beside them: its verdict on a hang came two seconds late, its evidence after four.
"""

from __future__ import annotations

import contextlib
import os

WATCHING_NICE = -10


def prefer_us() -> None:
    """This process before those that compute. Nothing where we may not: the unit then has done it (Nice=). Nor where somebody
    gave it less on purpose."""
    if WATCHING_NICE < _nice() <= 0:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, WATCHING_NICE)


def as_others() -> None:
    """A child of ours that works rather than watches: no more than anybody's. Who was given less keeps that."""
    if _nice() < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)


def _nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)
