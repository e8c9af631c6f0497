"""When a start has failed: two kinds of progress, two clocks, what systemd is told of them; and the watchdog's ping."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from itertools import pairwise

import pytest

from tests import procs
from tests.component.daemons import Tampered, ends, extends, first, hold, quick, stop
from tests.harness import Instance

# Their clocks are of a second, which is short for a daemon that shares its processor with another test's.
pytestmark = [pytest.mark.component, pytest.mark.alone]

STALL_S = 1.0
CLOCKS = {"start": {"stall_timeout_s": STALL_S}, "stop": {"kill_timeout_s": 2}}


def starting(fake: Mapping[str, str]) -> Instance:
    """Four times as fast as the fake says, since its imports are silent, and must be over before the stall clock is."""
    return quick({"FAKE_SPEED": "4", **fake}, CLOCKS)


def last_progress(instance: Instance) -> float:
    """When the last new phase was told."""
    return max(message.at for message in instance.notify.messages if message.get("STATUS").startswith("Starting: "))


def assert_systemd_would_wait(instance: Instance, until: float) -> None:
    """TimeoutStartSec= would never have ended it: every extension came long before the one before it was over."""
    told = [each for each in extends(instance) if each[0] < until]
    assert told
    for (_, limit), (at, _) in pairwise([*told, (until, 0.0)]):
        assert at < limit - 10, f"{limit - at:.1f} s before systemd's patience was over\n{instance.describe()}"


def test_a_start_with_strong_progress_outlasts_the_stall_timeout() -> None:
    with starting({"FAKE_START_S": "16"}) as instance:
        ready = instance.wait_ready()
        assert ready.at - first(instance, "STATUS", "Starting: spawn").at > 3 * STALL_S
        assert_systemd_would_wait(instance, ready.at)
        # Short extensions that follow the clocks, not one of hours: a supervisor that hangs must be noticed.
        spawned = first(instance, "STATUS", "Starting: spawn").at
        while_starting = [end - at for at, end in extends(instance) if at > spawned]
        assert max(while_starting) < 3 * STALL_S + 2 + 15 + 1


def test_a_start_without_progress_ends_with_75_after_the_stall_timeout() -> None:
    with starting({"FAKE_START_S": "240", "FAKE_PROGRESS": "none"}) as instance:
        error = ends(instance, 75, "start_stalled", ready=False)
        assert "no progress" in error["what"]
        assert "in phase starting-engine" in error["what"] or "in phase loading-weights" in error["what"]
        stalled = first(instance, "STOPPING").at
        assert STALL_S * 0.9 < stalled - last_progress(instance) < 3 * STALL_S
        assert_systemd_would_wait(instance, stalled)


@pytest.mark.parametrize(
    "fake", [{"FAKE_PROGRESS": "cpu"}, {"FAKE_PROGRESS": "lines", "FAKE_LINE_S": "1.2"}], ids=["cpu", "same line"]
)
def test_weak_progress_stretches_the_stall_clock_three_times_and_no_more(fake: Mapping[str, str]) -> None:
    with starting({"FAKE_START_S": "240", **fake}) as instance:
        ends(instance, 75, "start_stalled", ready=False)
        stalled = first(instance, "STOPPING").at
        assert 2.8 * STALL_S < stalled - last_progress(instance) < 5 * STALL_S
        assert_systemd_would_wait(instance, stalled)


def test_the_start_timeout_ends_whatever_moves() -> None:
    with quick({"FAKE_START_S": "20"}, {"start": {"start_timeout_s": 2}}) as instance:
        error = ends(instance, 75, "start_timeout", ready=False)
        assert "did not come up" in error["what"]
        took = first(instance, "STOPPING").at - first(instance, "STATUS", "Starting: spawn").at
        assert 1.5 < took < 6


def test_an_engine_that_listens_and_never_answers_has_stalled() -> None:
    with quick({"FAKE_LISTEN": "mute"}, CLOCKS) as instance:
        ends(instance, 75, "start_stalled", ready=False)


@pytest.mark.parametrize("code", ["301", "401", "503"])
def test_a_health_that_is_none_is_named_while_it_lasts_and_when_the_start_has_stalled(code: str) -> None:
    """The engine's own lines say nothing of it: for it, all is well."""
    with quick({"FAKE_HEALTH": code}, CLOCKS) as instance:
        error = ends(instance, 75, "start_stalled", ready=False)
        assert error["what"].endswith(f"; /health answers {code}")
        assert any(told.startswith("Starting: ") and told.endswith(f"/health answers {code}") for told in instance.notify.told("STATUS"))


def test_the_clocks_of_the_start_begin_with_the_engine_not_with_the_download() -> None:
    instance = quick(config=CLOCKS)
    gate = hold(instance, "resolve")
    with instance:
        instance.wait_state("resolving")
        time.sleep(3 * STALL_S + 0.5)
        gate.touch()
        instance.wait_ready()


def test_verification_that_goes_on_after_the_proof_is_under_the_clocks_too() -> None:
    instance = quick(config={"model": {"verify": "sha256"}, **CLOCKS})
    hold(instance, "verify")
    with instance:
        ends(instance, 75, "start_stalled", ready=False)


def test_the_watchdog_is_fed_all_the_while() -> None:
    with quick({"FAKE_START_S": "1"}, watchdog_s=0.9) as instance:
        instance.wait_ready()
        procs.wait_until("ten pings", lambda: len(instance.notify.told("WATCHDOG")) >= 10, 30)
        stop(instance)
        pings = [message.at for message in instance.notify.messages if message.get("WATCHDOG")]
        assert max(b - a for a, b in pairwise(pings)) < 0.9


HANG = """
import os, time
from vllmd.daemon import Daemon
def reload(self):
    while not os.path.exists({gate!r}):
        time.sleep(0.01)
Daemon._reload = reload
"""


def test_a_loop_that_hangs_feeds_no_watchdog() -> None:
    instance = Tampered.quick()
    gate = instance.root / "gate"
    instance.patch = HANG.format(gate=str(gate))
    instance.env["WATCHDOG_USEC"] = "600000"
    with instance:
        instance.wait_ready()
        instance.signal(signal.SIGHUP)
        time.sleep(0.3)  # the signal arrives, and pings that were under way
        before = len(instance.notify.told("WATCHDOG"))
        time.sleep(1.2)
        assert len(instance.notify.told("WATCHDOG")) == before
        gate.touch()
        procs.wait_until("pings again", lambda: len(instance.notify.told("WATCHDOG")) > before)
        stop(instance)
