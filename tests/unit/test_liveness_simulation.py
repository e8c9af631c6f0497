"""A month of load without one false verdict, and real hangs within their bounds."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.simulated_engine import CANARY_TIMEOUT_S, LIMITS, NEVER, Burst, Simulation, Span, World, blocks_of, load

pytestmark = pytest.mark.unit

DAY_S = 86400.0
MONTH_S = 30 * DAY_S
SLACK_S = 2.0


@pytest.mark.timeout(300)
def test_a_month_brings_no_false_verdict() -> None:
    """Two ranks with days and nights, bursts, long prefills, slow steps, a server that stands still for minutes, suspends,
    a supervisor that is stopped, counters that begin anew."""
    random = Random(7)
    world = World(
        bursts=[load(random, MONTH_S, mean_gap_s=400), load(random, MONTH_S, mean_gap_s=2000)],
        blocks=blocks_of(random, MONTH_S, 7200),
        resets=[random.uniform(0, MONTH_S)],
        suspends=[(random.uniform(0, MONTH_S), random.uniform(2, DAY_S)) for _ in range(20)],
        stops=[(random.uniform(0, MONTH_S), random.uniform(10, 4000)) for _ in range(20)],
    )
    simulation = Simulation(world, seed=7)
    assert simulation.run(MONTH_S) == []
    assert simulation.busy_canaries == 0
    assert simulation.readings > 500_000
    assert simulation.canaries > 2000
    assert 30 <= simulation.gaps <= 40


@pytest.mark.parametrize("seed", range(8))
def test_a_wild_day_brings_no_false_verdict(seed: int) -> None:
    """Everything much denser: the server stands still every few minutes, also while a proof of life is on its way."""
    random = Random(seed)
    world = World(
        bursts=[load(random, DAY_S, mean_gap_s=random.choice([60, 300, 900]), nights=False) for _ in range(random.choice([1, 2, 4]))],
        blocks=blocks_of(random, DAY_S, 300),
        suspends=[(random.uniform(0, DAY_S), random.uniform(2, 3600)) for _ in range(20)],
        stops=[(random.uniform(0, DAY_S), random.uniform(1, 100)) for _ in range(20)],
        latency_s=random.choice([(0.004, 0.03), (0.5, 4.5), (0.01, 6.0)]),
    )
    simulation = Simulation(world, seed=seed)
    assert simulation.run(DAY_S) == []
    assert simulation.busy_canaries == 0


def test_a_first_request_that_compiles_is_none() -> None:
    world = World(bursts=[[Burst(100, 400, 4, 0.05, first_s=280)]])
    assert Simulation(world).run(2000) == []


def test_an_engine_that_sleeps_for_hours_is_none() -> None:
    world = World(bursts=[[Burst(100, 20000, 4, 0.05)]], hang_at=[200.0], asleep=[Span(190, 20000)])
    simulation = Simulation(world)
    assert simulation.run(15000) == []
    assert simulation.readings < 16000


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), rank=st.integers(0, 3), after=st.floats(6, 200))
def test_a_hang_under_load_is_found_within_its_bound(seed: int, rank: int, after: float) -> None:
    """Counted from the last heartbeat, whatever the other ranks do."""
    random = Random(seed)
    step = random.choice([0.01, 0.1, 0.9])
    bursts = [[*load(random, 900, mean_gap_s=100, nights=False)] for _ in range(4)]
    began = max(each[-1].end if each else 0.0 for each in bursts) + 1
    bursts[rank].append(Burst(began, began + 4000, 3, step))
    hang = began + after
    last = began + int(after / step) * step
    world = World(bursts=bursts, hang_at=[hang if index == rank else NEVER for index in range(4)])
    found = Simulation(world, seed).run(hang + 400)
    assert found, "never found"
    at, finding = found[0]
    assert finding.code == "engine_hung"
    assert f"rank {rank}" in finding.what
    assert LIMITS.hang_s <= at - last + step <= LIMITS.hang_s + SLACK_S + step


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), after=st.floats(5, 2000))
def test_a_hang_that_begins_idle_is_found_within_its_bound(seed: int, after: float) -> None:
    """Idle is what a reading has seen idle: the next after the last request comes within 5 s."""
    random = Random(seed)
    bursts = [[*load(random, 900, mean_gap_s=200, nights=False)] for _ in range(2)]
    began = max(each[-1].end if each else 0.0 for each in bursts) + after
    world = World(bursts=bursts, hang_at=[NEVER, began])
    found = Simulation(world, seed).run(began + 800)
    assert found, "never found"
    at, finding = found[0]
    assert (finding.code, finding.detector) == ("engine_hung", "canary")
    assert 0 < at - began <= LIMITS.canary_interval_s + CANARY_TIMEOUT_S + SLACK_S
    assert "rank 1" in finding.what


@pytest.mark.parametrize("busy", [True, False])
@settings(max_examples=30)
@given(began=st.floats(50, 250))
def test_a_server_that_stops_is_found_within_its_bound(busy: bool, began: float) -> None:
    world = World(bursts=[[Burst(10, 5000, 3, 0.1)] if busy else []], blocks=[Span(began, NEVER, cores=0.01)])
    found = Simulation(world).run(began + 200)
    assert found
    at, finding = found[0]
    assert finding.code == "engine_hung"
    bound = LIMITS.hang_s + SLACK_S if busy else LIMITS.hang_s + 5 + SLACK_S
    assert at - began <= bound


def test_a_hang_is_found_also_where_readings_are_lost_now_and_then() -> None:
    world = World(bursts=[[Burst(10, 5000, 3, 0.1)]], hang_at=[100.0], blocks=[Span(110 + 30 * index, 116 + 30 * index) for index in range(40)])
    found = Simulation(world).run(400)
    assert found
    assert found[0][0] <= 100 + LIMITS.hang_s + 4 * 10
