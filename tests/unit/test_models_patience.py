"""How long sources that cannot be reached are asked again: the clock runs only while nothing arrives."""

from __future__ import annotations

import pytest

from vllmd.models import patience
from vllmd.models.amounts import duration, progress, size
from vllmd.models.patience import Patience
from vllmd.models.progress import Progress

pytestmark = pytest.mark.unit


class Clock:
    """Instead of the module's time: sleeping moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


def test_pauses_double_up_to_five_minutes_within_the_time_allowed(clock: Clock) -> None:
    patient = Patience(10, 3600)
    pauses: list[float] = []
    said: list[Progress] = []
    while not patient.is_over():
        before = clock.now
        patient.wait("no route", said.append)
        pauses.append(clock.now - before)
    assert 8 <= pauses[0] <= 12
    assert 16 <= pauses[1] <= 24
    assert max(pauses) <= 360
    assert sum(pauses) == pytest.approx(3600, abs=1)
    assert len(pauses) > 12
    assert max(clock.slept) <= 10
    assert [event.level for event in said].count("warning") == len(pauses)
    assert all("no route" in event.text for event in said)


MIB = 1 << 20


def test_bytes_that_arrive_begin_the_clocks_anew(clock: Clock) -> None:
    patient = Patience(10, 60)
    patient.saw(Progress("fetch", done_bytes=5 * MIB, total_bytes=100 * MIB))
    clock.now += 59
    patient.saw(Progress("fetch", done_bytes=6 * MIB, total_bytes=100 * MIB))
    clock.now += 59
    assert not patient.is_over()
    patient.saw(Progress("fetch", done_bytes=6 * MIB, total_bytes=100 * MIB))
    patient.saw(Progress("verify", done_bytes=60 * MIB, total_bytes=100 * MIB))
    clock.now += 2
    assert patient.is_over()


def test_a_trickle_is_no_progress(clock: Clock) -> None:
    patient = Patience(10, 60)
    for second in range(61):
        patient.saw(Progress("fetch", done_bytes=5 * MIB + second, total_bytes=100 * MIB))
        clock.now += 1
    assert patient.is_over()


def test_what_an_earlier_attempt_left_is_no_progress(clock: Clock) -> None:
    patient = Patience(10, 60)
    clock.now += 59
    patient.saw(Progress("fetch", done_bytes=50 * MIB, total_bytes=100 * MIB))
    clock.now += 2
    assert patient.is_over()


def test_amounts_are_written_for_people() -> None:
    assert [size(count) for count in (0, 999, 1500, 2_500_000, 14_200_000_000, 3 * 10**12)] == ["0 bytes", "999 bytes", "1.5 kB", "2.5 MB", "14.2 GB", "3.0 TB"]
    assert [duration(seconds) for seconds in (0.4, 59, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]
    assert progress(3_200_000_000, 14_200_000_000, 118_000_000, 93) == "3.2 GB of 14.2 GB, 118.0 MB/s, 1 min 33 s left"
    assert progress(0, 10, 0, -1) == "0 bytes of 10 bytes"
