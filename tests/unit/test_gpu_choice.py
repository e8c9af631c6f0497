"""Which GPUs an instance gets: lists mean what they say, a number takes what is healthy, free, alike and least used."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.core.gpu_choice import (
    Banned,
    Choice,
    Device,
    Process,
    Refusal,
    Rules,
    Slice,
    choose,
    not_returned,
    shortages,
)

pytestmark = pytest.mark.unit


def gpu(index: int, used: int = 0, *, name: str = "H100", total: int = 80000, **more: object) -> Device:
    return Device(index, f"GPU-{index:08d}", name, total, total - used, **more)  # type: ignore[arg-type]


NEED = Rules(lambda total: int(0.9 * total))
FOUR = [gpu(0), gpu(1), gpu(2), gpu(3)]
BANNED = Banned("Xid 79 (fallen off the bus) since 10:00", "Reboot the host.")


def indices(found: Choice | Refusal) -> list[int]:
    assert isinstance(found, Choice), found
    return [each.index for each in found.whole]


def refusal(found: Choice | Refusal) -> Refusal:
    assert isinstance(found, Refusal), found
    return found


@pytest.mark.parametrize("wanted", ["none", 0, ()])
def test_none_needs_nothing(wanted: str | int | tuple[str, ...]) -> None:
    assert choose([replace(gpu(0), lost="lost")], wanted, NEED) == Choice()


@pytest.mark.parametrize(
    ("wanted", "visible", "chosen", "tokens"),
    [
        ("all", None, [0, 1, 2, 3], ()),
        ("all", "2,1", [2, 1], ("GPU-00000002", "GPU-00000001")),
        ("all", "", [], ()),
        (("3", "1"), None, [3, 1], ("GPU-00000003", "GPU-00000001")),
        (("GPU-00000002", "0"), None, [2, 0], ("GPU-00000002", "GPU-00000000")),
        (("GPU-00000002", "2"), None, [2], ("GPU-00000002",)),
        (("1",), "3", [1], ("GPU-00000001",)),
    ],
)
def test_all_and_lists_mean_what_they_say(wanted: str | tuple[str, ...], visible: str | None, chosen: list[int], tokens: tuple[str, ...]) -> None:
    found = choose(FOUR, wanted, NEED, visible)
    assert indices(found) == chosen
    assert isinstance(found, Choice)
    assert found.tokens == tokens


def test_a_gpu_of_the_list_that_is_not_there_is_named_with_those_that_are() -> None:
    found = refusal(choose(FOUR[:1], ("0", "GPU-dead"), NEED))
    assert (found.code, found.may_pass) == ("gpu_missing", False)
    assert "GPU-dead" in found.what
    assert "GPU-00000000" in found.hint


@pytest.mark.parametrize("wanted", ["all", ("0", "1")])
def test_one_quarantined_gpu_of_all_or_of_a_list_refuses(wanted: str | tuple[str, ...]) -> None:
    found = refusal(choose(FOUR[:2], wanted, replace(NEED, quarantined={"GPU-00000001": BANNED})))
    assert (found.code, found.may_pass, found.hint) == ("gpu_quarantined", False, "Reboot the host.")
    assert "GPU 1 H100" in found.what
    assert "Xid 79" in found.what
    assert indices(choose(FOUR, ("0",), replace(NEED, quarantined={"GPU-00000001": BANNED}))) == [0]


@pytest.mark.parametrize("lost", ["lost", "reset_required", "reboot_required"])
def test_a_lost_gpu_refuses(lost: str) -> None:
    found = refusal(choose([gpu(0, lost=lost)], "all", NEED))
    assert (found.code, found.may_pass) == ("gpu_lost", False)
    assert lost.replace("_", " ") in found.what


def test_a_number_passes_over_what_is_sick_leased_or_full() -> None:
    four = [gpu(0, lost="lost"), gpu(1), gpu(2, 20000), gpu(3)]
    rules = replace(NEED, quarantined={"GPU-00000001": BANNED})
    assert indices(choose(four, 1, rules)) == [3]
    assert indices(choose(FOUR, 2, replace(NEED, leased={"GPU-00000000": "instance a", "GPU-00000002": "instance b"}))) == [1, 3]


def test_a_number_takes_the_least_used() -> None:
    assert indices(choose([gpu(0, 500), gpu(1, 30), gpu(2, 400), gpu(3, 10)], 2, NEED)) == [1, 3]
    assert indices(choose([gpu(0, utilization_pct=80), gpu(1, utilization_pct=2)], 1, NEED)) == [1]


def test_a_number_prefers_one_model() -> None:
    mixed = [gpu(0, name="A10", total=24000), gpu(1, 900), gpu(2, name="A10", total=24000), gpu(3, 900)]
    assert indices(choose(mixed, 2, NEED)) == [0, 2]
    mixed[0] = replace(mixed[0], lost="lost")
    assert indices(choose(mixed, 2, NEED)) == [1, 3]
    assert indices(choose(mixed, 3, NEED)) == [1, 2, 3]


def test_a_number_that_nobody_can_have_now_names_who_has_them() -> None:
    two = [gpu(0), gpu(1, 70000, processes=(Process(77, 69000, "python3", "notebook.service"),))]
    found = refusal(choose(two, 1, replace(NEED, leased={"GPU-00000000": "instance a (pid 5)"})))
    assert (found.code, found.may_pass) == ("gpu_busy", True)
    assert "instance a (pid 5)" in found.what
    assert "python3 (pid 77, notebook.service) with 69000 MiB" in found.what


def test_a_number_that_the_host_does_not_have_is_not_waited_for() -> None:
    assert refusal(choose(FOUR, 5, NEED)).code == "gpu_missing"
    found = refusal(choose(FOUR[:2], 2, replace(NEED, quarantined={"GPU-00000001": BANNED})))
    assert (found.code, found.may_pass, found.hint) == ("gpu_quarantined", False, BANNED.hint)


def test_a_number_chooses_among_those_that_the_supervisor_was_given() -> None:
    assert indices(choose(FOUR, 1, NEED, "2,3")) == [2]
    assert refusal(choose(FOUR, 3, NEED, "2,3")).code == "gpu_missing"


def test_mig_devices_are_found_by_their_uuid_on_their_gpu() -> None:
    part = Slice("MIG-aa", 10000, 9900)
    divided = replace(gpu(0), slices=(part, Slice("MIG-bb")))
    found = choose([divided, gpu(1)], ("MIG-aa",), NEED)
    assert isinstance(found, Choice)
    assert (found.whole, found.slices, found.tokens) == ((), ((part, divided),), ("MIG-aa",))
    assert shortages(found, [divided, gpu(1)], NEED) == ""
    assert "5000 of 10000 MiB free" in shortages(found, [replace(divided, slices=(replace(part, memory_free_mib=5000),))], NEED)
    assert refusal(choose([divided], ("MIG-cc",), NEED)).code == "gpu_missing"
    assert indices(choose([divided, gpu(1)], 1, NEED)) == [1]
    assert refusal(choose([divided], 1, NEED)).may_pass


def test_memory_is_gated_on_the_gpus_that_the_engine_uses() -> None:
    chosen = choose(FOUR, "all", NEED)
    assert isinstance(chosen, Choice)
    now = [gpu(0), gpu(1), gpu(2), gpu(3, 70000)]
    assert shortages(chosen, now, NEED, 2) == ""
    assert "GPU 3" in shortages(chosen, now, NEED, 0)
    assert "GPU 3" in shortages(chosen, now, NEED, 4)
    assert shortages(chosen, now, Rules()) == ""
    assert shortages(chosen, [replace(each, memory_free_mib=None) for each in now], NEED) == "", "unified memory says nothing"


# -- after the end


def test_memory_that_is_as_before_or_nearly_is_back() -> None:
    assert not_returned([gpu(0, 500)], [gpu(0, 600)]) == ""
    assert not_returned([gpu(0, 500)], [gpu(0, 100)]) == ""
    assert not_returned([gpu(0, 500)], [replace(gpu(0, 60000), lost="lost")]) == ""
    assert not_returned([gpu(0, 500)], [gpu(1, 60000)]) == ""
    assert not_returned([gpu(0)], []) == ""


def test_memory_that_is_not_back_is_named_with_who_has_it() -> None:
    found = not_returned([gpu(0, 500)], [gpu(0, 60500, processes=(Process(77, 60000, "VLLM::Worker"),))])
    assert "GPU 0 H100" in found
    assert "60000 MiB less free" in found
    assert "VLLM::Worker (pid 77)" in found
    assert "no process that can be seen" in not_returned([gpu(0)], [gpu(0, 1000)])


def test_what_others_have_taken_meanwhile_is_theirs() -> None:
    other = Process(77, 60000, "python3", "notebook.service")
    assert not_returned([gpu(0)], [gpu(0, 60000, processes=(other,))]) == ""
    assert not_returned([gpu(0, 1000, processes=(replace(other, used_mib=1000),))], [gpu(0, 60000, processes=(other,))]) == ""
    assert not_returned([gpu(0)], [gpu(0, 70000, processes=(other,))]) != ""


# -- whatever the host is like

DEVICES = st.lists(
    st.tuples(st.integers(0, 80000), st.sampled_from(["H100", "A10"]), st.sampled_from(["", "", "", "lost"]), st.booleans(), st.booleans()),
    max_size=8,
)


@given(DEVICES, st.integers(1, 8))
def test_a_number_gets_as_many_usable_ones_or_a_reason(rows: list[tuple[int, str, str, bool, bool]], count: int) -> None:
    devices = [gpu(index, used, name=name, lost=lost) for index, (used, name, lost, _, _) in enumerate(rows)]
    uuids = [each.uuid for each in devices]
    banned = {uuid: BANNED for uuid, row in zip(uuids, rows, strict=True) if row[3]}
    leased = {uuid: "instance a" for uuid, row in zip(uuids, rows, strict=True) if row[4]}
    usable = {
        each.uuid for each in devices if not each.lost and each.uuid not in banned and each.uuid not in leased and (each.memory_free_mib or 0) >= 72000
    }
    found = choose(devices, count, Rules(NEED.needed_mib, banned, leased))
    if isinstance(found, Choice):
        assert len({each.uuid for each in found.whole}) == count
        assert {each.uuid for each in found.whole} <= usable
    else:
        assert len(usable) < count
        assert found.what
        assert found.hint
