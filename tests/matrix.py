"""The fault matrix: what a row of it measures, and the table that a test run prints at its end.

    with measured("SIGKILL of EngineCore", bound_s=0.5) as row:
        row.verdict_s = ...
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from os import close, pidfd_open

from tests import procs
from tests.harness import Instance

EMPTY_S = 1.0
"""How long the kill of a small engine may take to leave nothing; the evidence before it has 5 s of its own."""
EVIDENCE_S = 5.0


@dataclass
class Row:
    """Seconds from the fault; None: there was none, as it should be (or not yet)."""

    name: str
    bound_s: float | None
    verdict_s: float | None = None
    empty_s: float | None = None
    said: str = ""
    held: bool = False


ROWS: list[Row] = []


@contextlib.contextmanager
def measured(name: str, bound_s: float | None = None) -> Iterator[Row]:
    """A row of the table, in it also when the test fails; the verdict's bound is checked at the end of the block."""
    row = Row(name, bound_s)
    ROWS.append(row)
    yield row
    if bound_s is not None and row.verdict_s is not None:
        assert row.verdict_s <= bound_s, f"{name}: noticed after {row.verdict_s:.2f} s, the bound is {bound_s:g} s"
    row.held = True


def watch_the_end(instance: Instance, row: Row, fault_at: float, *, within_s: float, empty_s: float = EVIDENCE_S + EMPTY_S) -> None:
    """From the fault to STOPPING=1, and from there to an engine without processes, which has its own bound."""
    stopping = instance.wait_notify(lambda message: message.get("STOPPING") == "1", within_s)
    row.verdict_s = stopping.at - fault_at
    procs.wait_until("no process of the engine", lambda: not left(instance), empty_s + 10, 0.005)
    row.empty_s = time.monotonic() - fault_at
    took = row.empty_s - row.verdict_s
    assert took <= empty_s, f"{took:.2f} s from the verdict to nothing left: {instance.describe()}"


def left(instance: Instance) -> list[int]:
    return instance.cgroup.members("engine-") if instance.cgroup else instance.engine_pids()


def wait_for_the_death_of(pid: int, timeout_s: float = 30.0) -> float:
    """When it ended: the kernel says so, also of a process that is not ours."""
    fd = pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        assert poller.poll(timeout_s * 1000), f"{pid} has not ended within {timeout_s:g} s"
        return time.monotonic()
    finally:
        close(fd)


def table() -> list[str]:
    """One line for each row."""
    lines = [f"{'fault':62} {'bound':>8} {'verdict':>9} {'empty':>9}  said"]
    for row in ROWS:
        times = [f"{value:.2f} s" if value is not None else "none" for value in (row.verdict_s, row.empty_s)]
        bound = f"{row.bound_s:g} s" if row.bound_s is not None else "none"
        lines.append(f"{row.name[:62]:62} {bound:>8} {times[0]:>9} {times[1]:>9}  {'' if row.held else 'FAILED '}{row.said[:90]}")
    return lines
