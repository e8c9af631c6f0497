"""The lifecycle's table: every pair classified, and the properties that hold on every reachable path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.core import events as ev
from vllmd.core.lifecycle import IGNORED, TABLE, Impossible, Life, State, classify, step

pytestmark = pytest.mark.unit

LOST = ev.Failure("lost", "it is lost", "find it", 70)
NAMED = ev.Failure("cuda_out_of_memory", "it is lost: no memory on the GPU", "lower it", 70)
UNKILLABLE = ev.Failure("unkillable", "pid 7 is in D state", "reboot", 75)
SAMPLES: list[ev.Event] = [
    ev.Begun(selected=True),
    ev.Begun(selected=False),
    ev.PreflightPassed(),
    ev.ModelResolved(),
    ev.ModelVerified(),
    ev.EngineSpawned(),
    ev.ProofPassed(),
    ev.StageFailed(LOST),
    ev.EngineExited(LOST),
    ev.VerdictReached(LOST),
    ev.StartExpired(LOST),
    ev.Paused(),
    ev.Resumed(),
    ev.EvidenceGathered(NAMED),
    ev.StopRequested("signal"),
    ev.StopRequested("group"),
    ev.ReloadRequested(),
    ev.DrainExpired(),
    ev.TreeEmptied(),
    ev.KillExpired(UNKILLABLE),
    ev.Faulted(LOST),
]
ENDS = (ev.TreeEmptied(), ev.KillExpired(UNKILLABLE))


def legal(life: Life) -> list[ev.Event]:
    return [event for event in SAMPLES if classify(life.state, type(event)) != "bug"]


def walk(events: Sequence[ev.Event], life: Life | None = None) -> tuple[Life, list[ev.Effect]]:
    life = life or Life()
    effects: list[ev.Effect] = []
    for event in events:
        life, new = step(life, event)
        effects += new
    return life, effects


START: list[ev.Event] = [
    ev.Begun(selected=True), ev.PreflightPassed(), ev.ModelResolved(), ev.ModelVerified(), ev.EngineSpawned(), ev.ProofPassed(),
]  # fmt: skip


def reachable() -> dict[Life, list[ev.Event]]:
    """Every life that legal events lead to, with one path to it."""
    paths: dict[Life, list[ev.Event]] = {Life(): []}
    todo = [Life()]
    while todo:
        life = todo.pop()
        for event in legal(life):
            after, _ = step(life, event)
            if after not in paths:
                paths[after] = [*paths[life], event]
                todo.append(after)
    return paths


def test_matrix_classifies_every_pair_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert not set(TABLE) & IGNORED
    mark = {"handled": "#", "ignored": ".", "bug": "!"}
    names = [event.__name__ for event in ev.EVENTS]
    for state in State:
        row = " ".join(mark[classify(state, event)] for event in ev.EVENTS)
        print(f"{state:>13} {row}")
    print("columns:", ", ".join(names))
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(State) + 1
    assert {state for state, _ in TABLE} == set(State) - {State.STOPPED}


def test_every_event_and_effect_is_used() -> None:
    assert {event for _, event in TABLE} == set(ev.EVENTS)
    seen = {type(effect) for life in reachable() for event in legal(life) for effect in step(life, event)[1]}
    assert seen == set(ev.Effect.__args__)


def test_every_state_is_reachable() -> None:
    assert {life.state for life in reachable()} == set(State)


def test_a_start_tells_ready_after_proof_and_verification() -> None:
    life, effects = walk(START)
    assert life.state is State.READY
    assert [type(effect).__name__ for effect in effects] == [
        "RunPreflight", "ResolveModel", "LaunchEngine", "ProbeStart", "TellReady", "WatchEngine",
    ]  # fmt: skip


def test_proof_without_verified_bytes_is_not_ready() -> None:
    path = [event for event in START if not isinstance(event, ev.ModelVerified)]
    life, effects = walk(path)
    assert life.state is State.PROVEN
    assert not any(isinstance(effect, ev.TellReady) for effect in effects)
    life, effects = walk([ev.ModelVerified()], life)
    assert life.state is State.READY
    assert isinstance(effects[0], ev.TellReady)


def test_unconfigured_is_ready_without_stages() -> None:
    life, effects = walk([ev.Begun(selected=False)])
    assert life.state is State.UNCONFIGURED
    assert effects == [ev.TellReady()]
    _, effects = walk([ev.StopRequested("signal"), ev.TreeEmptied()], life)
    assert effects[-1] == ev.Finish(0)


def test_ready_is_told_once_and_only_from_where_it_is_due() -> None:
    due = {State.CREATED, State.STARTING, State.PROVEN}
    for life, path in reachable().items():
        _, effects = walk(path)
        assert Counter(map(type, effects))[ev.TellReady] <= 1, path
        for event in legal(life):
            after, new = step(life, event)
            if any(isinstance(effect, ev.TellReady) for effect in new):
                assert life.state in due
                assert after.state in {State.READY, State.UNCONFIGURED}


@given(st.data())
def test_ready_is_told_at_most_once_on_any_path(data: st.DataObject) -> None:
    life, told = Life(), 0
    for _ in range(data.draw(st.integers(0, 25))):
        life, effects = step(life, data.draw(st.sampled_from(legal(life))))
        told += sum(isinstance(effect, ev.TellReady) for effect in effects)
    assert told <= 1


def test_stop_ends_from_every_reachable_life() -> None:
    for life in reachable():
        if life.state is State.STOPPED:
            continue
        for end in ENDS:
            stopping, effects = walk([ev.StopRequested("signal")], life)
            if stopping.state is State.DRAINING:
                stopping, more = walk([ev.DrainExpired()], stopping)
                effects += more
            assert stopping.state is State.KILLING, life
            # a life that was killing before has asked for its kill already
            assert ev.KillTree() in effects or life.state is State.KILLING
            ended, last = walk([end], stopping)
            assert ended.state is State.STOPPED
            assert isinstance(last[-1], ev.Finish)


def test_a_stop_that_was_asked_for_exits_0_whatever_the_engine_says() -> None:
    life, effects = walk([*START, ev.StopRequested("signal"), ev.EngineExited(LOST), ev.TreeEmptied()])
    assert life.failure is None
    assert effects[-1] == ev.Finish(0)


def test_an_engine_that_exits_by_itself_is_a_failure() -> None:
    life, effects = walk([*START, ev.EngineExited(LOST), ev.EvidenceGathered(LOST), ev.TreeEmptied()])
    assert effects[-1] == ev.Finish(70)
    assert life.failure == LOST


def test_evidence_is_gathered_before_the_kill_and_names_the_cause() -> None:
    life, effects = walk([*START, ev.VerdictReached(LOST)])
    assert life.state is State.EXAMINING
    assert effects[-2:] == [ev.TellStopping(), ev.GatherEvidence(LOST)]
    life, effects = walk([ev.EvidenceGathered(NAMED)], life)
    assert life.state is State.KILLING
    assert effects == [ev.RecordFailure(NAMED), ev.KillTree()]
    assert life.failure == NAMED


@pytest.mark.parametrize("event", [ev.StageFailed(LOST), ev.EngineExited(LOST), ev.StartExpired(LOST)])
def test_a_failure_of_a_running_engine_is_examined_also_during_its_start(event: ev.Event) -> None:
    for path in (START[:5], [each for each in START if not isinstance(each, ev.ModelVerified)]):
        life, _ = walk([*path, event])
        assert life.state is State.EXAMINING


def test_while_examined_a_second_failure_changes_nothing() -> None:
    examined, _ = walk([*START, ev.VerdictReached(LOST)])
    for event in (ev.EngineExited(UNKILLABLE), ev.VerdictReached(UNKILLABLE), ev.StageFailed(UNKILLABLE), ev.StartExpired(UNKILLABLE)):
        assert step(examined, event) == (examined, ())


@pytest.mark.parametrize("event", [ev.StopRequested("signal"), ev.Faulted(UNKILLABLE)])
def test_a_stop_or_a_bug_ends_the_examination_and_keeps_the_reason(event: ev.Event) -> None:
    life, effects = walk([event], walk([*START, ev.VerdictReached(LOST)])[0])
    assert life.state is State.KILLING
    assert effects == [ev.RecordFailure(LOST), ev.KillTree()]
    # the evidence that was on its way comes late
    assert step(life, ev.EvidenceGathered(NAMED)) == (life, ())


def test_unkillable_after_a_stop_exits_75_and_is_recorded() -> None:
    _, effects = walk([*START, ev.StopRequested("signal"), ev.DrainExpired(), ev.KillExpired(UNKILLABLE)])
    assert effects[-2:] == [ev.RecordFailure(UNKILLABLE), ev.Finish(75)]


def test_the_first_failure_stays_the_reason() -> None:
    life, effects = walk([*START, ev.VerdictReached(LOST), ev.EngineExited(UNKILLABLE), ev.EvidenceGathered(LOST), ev.KillExpired(UNKILLABLE)])
    assert life.failure == LOST
    assert [e.failure for e in effects if isinstance(e, ev.RecordFailure)] == [LOST]
    assert effects[-1] == ev.Finish(75)


def test_stopping_is_told_before_any_teardown() -> None:
    for life in reachable():
        for event in legal(life):
            _, effects = step(life, event)
            kinds = [type(effect) for effect in effects]
            if ev.KillTree in kinds and life.state not in {State.DRAINING, State.EXAMINING, State.KILLING}:
                assert kinds[0] is ev.TellStopping, (life, event)
            if ev.GatherEvidence in kinds:
                assert kinds == [ev.TellStopping, ev.GatherEvidence]


def test_interrupted_at_any_effect_a_stop_is_still_legal() -> None:
    """Effects are performed one by one; a signal may arrive between any two of them."""
    for life in reachable():
        for event in legal(life):
            after, _ = step(life, event)
            if after.state is not State.STOPPED:
                assert classify(after.state, ev.StopRequested) != "bug"


def test_a_pair_that_cannot_happen_is_a_bug() -> None:
    with pytest.raises(Impossible):
        step(Life(), ev.TreeEmptied())


@pytest.mark.parametrize("path", [START[:5], [each for each in START if not isinstance(each, ev.ModelVerified)], START], ids=["starting", "proven", "ready"])
def test_while_paused_nothing_ends_it_and_afterwards_what_happened_does(path: list[ev.Event]) -> None:
    paused, _ = walk([*path, ev.Paused()])
    for event in (ev.EngineExited(LOST), ev.StageFailed(UNKILLABLE), ev.StartExpired(UNKILLABLE), ev.VerdictReached(UNKILLABLE)):
        if classify(paused.state, type(event)) != "bug":
            after, new = step(paused, event)
            assert (after.state, new) == (paused.state, ())
    exited, _ = walk([ev.EngineExited(LOST), ev.EngineExited(UNKILLABLE)], paused)
    life, effects = step(exited, ev.Resumed())
    assert life.state is State.EXAMINING
    assert life.failure == LOST
    assert effects == (ev.TellStopping(), ev.GatherEvidence(LOST))


def test_a_pause_without_consequence_leaves_everything_as_it_was() -> None:
    ready, _ = walk(START)
    assert walk([ev.Paused(), ev.Resumed()], ready) == (ready, [])


def test_a_stop_goes_on_while_paused() -> None:
    _, effects = walk([*START, ev.Paused(), ev.EngineExited(LOST), ev.StopRequested("signal"), ev.DrainExpired(), ev.TreeEmptied()])
    assert effects[-1] == ev.Finish(0)
