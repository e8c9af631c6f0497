"""What each Xid means, what an instance does about a finding, and what the book makes of one after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllmd.config.detectors import GPU
from vllmd.config.settings import GpuWatch
from vllmd.core import gpu_conditions, xids
from vllmd.core.gpu_book import HOLD_S, SAME_S, WINDOW_S, Book
from vllmd.core.gpu_findings import (
    Finding,
    canonical_pci,
    is_fatal_line,
    judge_for_instance,
    of_recovery,
    of_xid,
    parse,
)
from vllmd.core.xids import CLASSES

pytestmark = pytest.mark.unit

TABLE = {
    "app": {8, 11, 13, 25, 31, 32, 39, 40, 41, 43, 68, 69, 70, 71, 80, 85, 94, *range(126, 136), 137},
    "sympathetic": {45},
    "reset": {46, 48, 62, 95, 109, 110, 119, 120, 136, 140, 155, 156, 158},
    "nvlink": {74, *range(144, 151)},
    "reboot": {79, 143, 167},
    "replace": {64},
    "warn": {63, 92, 121, 157, 160, 161, 168},
    "ask": {154},
    "human": {54, 78},
}
OURS = "GPU-ours"


def test_the_table_has_every_xid_in_its_class_and_no_other() -> None:
    assert {cls: {number for number, row in xids.TABLE.items() if row.cls == cls} for cls in CLASSES} == TABLE


@pytest.mark.parametrize("number", [*xids.TABLE, 1, 9999])
def test_every_xid_says_what_it_is_and_what_to_do(number: int) -> None:
    finding = of_xid(number, uuid=OURS, pci="0000:10:00.0")
    assert str(number) in finding.what
    assert len(finding.hint) > 20
    assert finding.detector in GPU
    assert parse(finding.as_dict()) == finding


def judged(number: int, *, own: bool = True, uuid: str = OURS, gpus: int = 1, pid: int = 7, detail: str = "") -> str:
    return judge_for_instance(of_xid(number, uuid=uuid, pid=pid, detail=detail), {OURS}, own, gpus)


@pytest.mark.parametrize(("cls", "own", "others", "nobody"), [
    ("app", "restart", "ignore", "journal"),
    ("sympathetic", "journal", "journal", "journal"),
    ("reset", "quarantine", "quarantine", "quarantine"),
    ("reboot", "quarantine", "quarantine", "quarantine"),
    ("replace", "quarantine", "quarantine", "quarantine"),
    ("warn", "journal", "journal", "journal"),
    ("ask", "journal", "journal", "journal"),
    ("human", "journal", "journal", "journal"),
])  # fmt: skip
def test_what_an_instance_does_by_class(cls: str, own: str, others: str, nobody: str) -> None:
    for number in TABLE[cls]:
        assert judged(number) == own, number
        assert judged(number, own=False) == others, number
        assert judged(number, own=False, pid=0) == nobody, number
        assert judged(number, uuid="GPU-another") == "ignore", number


def test_nvlink_errors_end_only_engines_on_several_gpus_and_only_fatal_ones() -> None:
    for number in range(144, 151):
        assert judged(number, gpus=2, detail="NVLINK: RLW Fatal, Link 05") == "restart"
        assert judged(number, gpus=2, detail="NVLINK: RLW Nonfatal, Link 05") == "journal"
        assert judged(number, gpus=2) == "journal"
        assert judged(number, gpus=1, detail="NVLINK: RLW Fatal") == "journal"
    assert (judged(74, gpus=2), judged(74, gpus=1)) == ("restart", "journal")


@pytest.mark.parametrize("text", ["NVLINK: SAW Nonfatal", "Non-Fatal", "non fatal, x", "", "fatality"])
def test_an_nvlink_line_that_is_not_fatal(text: str) -> None:
    assert not is_fatal_line(text)


@pytest.mark.parametrize(("action", "cls", "does"), [
    (1, "reset", "quarantine"), (2, "reboot", "quarantine"), (3, "nvlink", "restart"), (4, "reset", "journal"),
    (5, "replace", "journal"), (6, "replace", "journal"), (7, "reboot", "quarantine"), (99, "replace", "journal"),
])  # fmt: skip
def test_the_driver_s_own_verdict(action: int, cls: str, does: str) -> None:
    finding = of_recovery(action, uuid=OURS, pci="", at=1.0)
    assert (finding.cls, judge_for_instance(finding, {OURS}, False, 2)) == (cls, does)


def test_a_stuck_driver_ends_no_engine() -> None:
    stuck = Finding("", "", "gpu_stuck", 0, "human", what="x")
    assert judge_for_instance(stuck, {OURS}, False, 1) == "journal"


@pytest.mark.parametrize("words", [
    None, [], {}, {"cls": "other", "uuid": ""}, of_xid(13).as_dict() | {"pid": True}, of_xid(13).as_dict() | {"xid": -1},
    of_xid(13).as_dict() | {"what": "a\x1b[31m"}, of_xid(13).as_dict() | {"hint": "x" * 500}, of_xid(13).as_dict() | {"at": "now"}, of_xid(13).as_dict() | {"cls": ["app"]},
])  # fmt: skip
def test_what_is_no_finding_is_none(words: object) -> None:
    assert parse(words) is None


@pytest.mark.parametrize("text", ["0000:10:00", "00000000:10:00.0", "PCI:0000:10:00", "0000:10:00.0"])
def test_a_gpu_s_place_has_one_name(text: str) -> None:
    assert canonical_pci(text) == "0000:10:00.0"
    assert canonical_pci("0000:10") == canonical_pci("x") == ""


class TestBook:
    @pytest.fixture
    def book(self) -> Book:
        return Book(GpuWatch())

    def test_the_kernel_s_line_and_nvml_s_event_are_one(self, book: Book) -> None:
        kernel, event = of_xid(79, uuid="a", pid=5), of_xid(79, uuid="a")
        assert book.xid(kernel, 10.0) == [kernel]
        assert book.xid(event, 10.0 + SAME_S * 0.9) == []
        assert book.is_told("a", 79, 0, 10.5)
        assert book.xid(event, 10.0 + SAME_S) == [event]
        assert book.repeated == 2

    def test_the_process_that_only_the_kernel_knows_is_told_after_nvml_s_event(self, book: Book) -> None:
        event, kernel = of_xid(31, uuid="a"), of_xid(31, uuid="a", pid=5)
        assert book.xid(event, 10.0) == [event]
        assert not book.is_told("a", 31, 5, 10.1)
        assert book.xid(kernel, 10.1) == [kernel]
        assert book.xid(kernel, 10.2) == []

    def test_the_same_error_of_another_process_is_another(self, book: Book) -> None:
        one, two = of_xid(31, uuid="a", pid=5), of_xid(31, uuid="a", pid=6)
        assert book.xid(one, 10.0) == [one]
        assert book.xid(two, 10.1) == [two]
        assert book.xid(one, 10.2) == []

    def test_other_gpus_and_other_errors_are_others(self, book: Book) -> None:
        for finding in (of_xid(31, uuid="a"), of_xid(31, uuid="b"), of_xid(32, uuid="a")):
            assert book.xid(finding, 10.0) == [finding]

    def test_three_errors_of_two_engines_within_an_hour_make_a_gpu_suspect(self, book: Book) -> None:
        gpu = {"uuid": "a"}
        assert len(book.xid(of_xid(31, uuid="a", pid=5), 0.0)) == 1
        assert len(book.xid(of_xid(13, uuid="a", pid=5), 100.0)) == 1
        assert book.verdict(gpu, None, 101.0)["class"] == "ok"
        told, suspect = book.xid(of_xid(31, uuid="a", pid=6), 200.0)
        assert (told.xid, suspect.xid, suspect.cls, suspect.fatal) == (31, 0, "human", False)
        assert "2 processes" in suspect.what
        assert book.verdict(gpu, None, 201.0)["class"] == "suspect"
        assert len(book.xid(of_xid(31, uuid="a", pid=7), 300.0)) == 1, "said once an hour"
        assert book.verdict(gpu, None, 300.0 + WINDOW_S)["class"] == "ok"

    def test_three_errors_of_one_engine_or_over_two_hours_do_not(self, book: Book) -> None:
        for at in (0.0, 10.0, 20.0):
            assert len(book.xid(of_xid(31, uuid="a", pid=5), at)) == 1
        for at, pid in ((0.0, 5), (1800.0, 6), (WINDOW_S + 1, 7)):
            assert len(book.xid(of_xid(31, uuid="b", pid=pid), at)) == 1

    def test_an_error_counts_once_when_both_sources_tell_it(self, book: Book) -> None:
        for at, pid in ((0.0, 5), (10.0, 6)):
            book.xid(of_xid(31, uuid="a"), at)
            assert len(book.xid(of_xid(31, uuid="a", pid=pid), at + 0.1)) == 1

    def test_a_context_switch_timeout_costs_the_gpu_only_when_it_comes_again(self, book: Book) -> None:
        first = book.xid(of_xid(109, uuid="a"), 0.0)
        assert [(each.cls, each.fatal) for each in first] == [("app", False)]
        assert [each.cls for each in book.xid(of_xid(109, uuid="a", pid=5), 0.1)] == ["app"], "the same one, with its process"
        again = book.xid(of_xid(109, uuid="a", pid=6), 100.0)
        assert [(each.cls, each.fatal) for each in again] == [("reset", True)]
        assert [each.cls for each in book.xid(of_xid(109, uuid="a"), 100.0 + WINDOW_S + 1)] == ["app"]

    def test_a_storm_is_remembered_in_bounded_space(self, book: Book) -> None:
        for number in range(20_000):
            book.xid(of_xid(13, uuid=f"GPU-{number}", pid=number), number / 100)
        assert len(book._told) <= 4096


FINE: dict[str, Any] = {
    "index": 0, "uuid": "a", "pci": "0000:10:00.0", "lost": "", "recovery_action": 0, "remapped": {"correctable": 0, "uncorrectable": 0, "pending": False, "failed": False},
    "ecc": {"corrected": 0, "uncorrected": 0}, "clock_reasons": ["idle"], "pcie": {"gen": 1, "width": 16, "max_gen": 5, "max_width": 16}, "fabric": "completed",
    "nvlink": {"crc_errors": 5}, "temperature_c": 40,
}  # fmt: skip


def over_time(book: Book, *changes: dict[str, Any], every_s: float = 5.0) -> list[list[Finding]]:
    """The findings of each snapshot in turn."""
    return [book.snapshot([FINE | change], 1000 + number * every_s, 1e9) for number, change in enumerate(changes)]


@pytest.mark.parametrize(("change", "detector", "cls", "fatal", "verdict"), [
    ({"lost": "lost"}, "gpu_lost", "reboot", True, "lost"),
    ({"lost": "reset_required"}, "gpu_lost", "reset", True, "reset"),
    ({"recovery_action": 1}, "gpu_xid", "reset", True, "reset"),
    ({"recovery_action": 2}, "gpu_xid", "reboot", True, "reboot"),
    ({"recovery_action": 4}, "gpu_xid", "reset", False, "reset"),
    ({"recovery_action": 42}, "gpu_xid", "replace", False, "replace"),
    ({"remapped": {"failed": True}}, "gpu_remap", "replace", True, "replace"),
    ({"remapped": {"pending": True}}, "gpu_remap", "warn", False, "warn"),
    ({"remapped": {"uncorrectable": 512}}, "gpu_remap", "warn", False, "warn"),
    ({"retired_pages": 63}, "gpu_remap", "replace", True, "replace"),
    ({"ecc": {"uncorrected": 2}}, "gpu_ecc", "warn", False, "warn"),
    ({"clock_reasons": ["hardware_thermal", "hardware_slowdown"]}, "gpu_thermal", "warn", False, "warn"),
    ({"clock_reasons": ["power_brake", "hardware_slowdown"]}, "gpu_power", "warn", False, "warn"),
    ({"clock_reasons": ["hardware_slowdown"]}, "gpu_thermal", "warn", False, "warn"),
    ({"nvlink": {"crc_errors": 600}}, "gpu_nvlink", "nvlink", False, "warn"),
])  # fmt: skip
def test_a_condition_is_found_once_while_it_holds_and_again_when_it_came_back(change: dict[str, Any], detector: str, cls: str, fatal: bool, verdict: str) -> None:
    book = Book(GpuWatch())
    first, found, still = over_time(book, {}, change, change)
    assert first == still == []
    assert [(each.detector, each.cls, each.fatal, each.uuid, each.xid) for each in found] == [(detector, cls, fatal, "a", 0)]
    assert found[0].what
    assert found[0].hint
    assert book.verdict(FINE, None, 1010)["class"] == verdict
    assert book.snapshot([FINE], 2000, 1e9) == []
    assert book.verdict(FINE, None, 2000)["class"] == "ok"
    assert book.snapshot([FINE], 2000 + HOLD_S, 1e9) == []
    if detector not in ("gpu_nvlink", "gpu_ecc"):  # those are rates
        assert len(book.snapshot([FINE | change], 3000, 1e9)) == 1


@pytest.mark.parametrize("change", [
    {"remapped": {"uncorrectable": 511}}, {"retired_pages": 62}, {"ecc": {"corrected": 1_000_000, "uncorrected": 0}}, {"clock_reasons": ["software_power_cap", "software_thermal"]},
    {"nvlink": {"crc_errors": 500}}, {"nvlink": {}}, {"ecc": {}}, {"pcie": {}}, {"fabric": ""}, {"fabric": "in progress"}, {"remapped": {}}, {"recovery_action": None},
    {"clock_reasons": None}, {"clock_reasons": [1, {}]}, {"ecc": "x"}, {"remapped": None},
    {"pcie": {"gen": 1, "width": 8}},
])  # fmt: skip
def test_what_is_below_a_threshold_or_missing_is_no_finding(change: dict[str, Any]) -> None:
    assert over_time(Book(GpuWatch()), {}, change, change, change) == [[], [], [], []]


@pytest.mark.parametrize(("change", "detector"), [({"pcie": {"width": 8, "max_width": 16}}, "gpu_pcie"), ({"fabric": "not started"}, "gpu_fabric"), ({"fabric": "failed with 3"}, "gpu_fabric")])
def test_a_link_counts_when_two_snapshots_agree(change: dict[str, Any], detector: str) -> None:
    assert [[each.detector for each in found] for found in over_time(Book(GpuWatch()), {}, change, {}, change, change, change)] == [[], [], [], [], [detector], []]


def test_memory_errors_that_were_there_before_are_not_new() -> None:
    bad = {"ecc": {"uncorrected": 7}}
    assert over_time(Book(GpuWatch()), bad, bad) == [[], []]
    assert over_time(Book(GpuWatch()), bad, {}) == [[], []], "a reloaded driver counts from 0"


def test_thresholds_are_settings() -> None:
    book = Book(replace(GpuWatch(), remapped_rows_warn=3, nvlink_crc_per_s=1000.0))
    assert [len(found) for found in over_time(book, {}, {"remapped": {"uncorrectable": 3}}, {"nvlink": {"crc_errors": 4000}})] == [0, 1, 0]


def test_a_flapping_condition_is_told_once_and_a_lost_gpu_each_time() -> None:
    hot = {"clock_reasons": ["hardware_thermal"]}
    assert sum(len(found) for found in over_time(Book(GpuWatch()), *[hot, {}] * 6)) == 1
    assert sum(len(found) for found in over_time(Book(GpuWatch()), *[{"lost": "lost"}, {}] * 3)) == 3


def test_the_driver_s_verdict_from_the_kernel_s_log_is_not_told_again_by_the_snapshot() -> None:
    book = Book(GpuWatch())
    over_time(book, {})
    [told] = book.recovery({"uuid": "a", "pci": "", "recovery_action": 2}, 1001, 5.0)
    assert (told.cls, told.uuid, told.at) == ("reboot", "a", 5.0)
    assert book.snapshot([FINE | {"recovery_action": 2}], 1005, 6.0) == []


def test_a_quarantine_is_part_of_the_verdict_and_the_graver_counts() -> None:
    book = Book(GpuWatch())
    book.snapshot([FINE | {"lost": "lost"}], 1000, 1e9)
    assert book.verdict(FINE, ("reset", "why", "do"), 1000)["class"] == "lost"
    assert book.verdict({"uuid": "b"}, ("reset", "why", "do"), 1000) == {"class": "reset", "what": "why", "hint": "do"}
    book.forget("a")
    assert book.verdict(FINE, None, 1000)["class"] == "ok"


def test_clock_reasons_have_names() -> None:
    assert gpu_conditions.clock_reasons(0) == []
    assert gpu_conditions.clock_reasons(0x40 | 0x8 | 0x8000) == ["hardware_slowdown", "hardware_thermal", "0x8000"]
