"""What facts of GPUs mean: thresholds, choice of GPUs, the driver, the engine's build."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vllmd.preflight import gates
from vllmd.preflight.fit import misfits
from vllmd.preflight.gates import Limits
from vllmd.preflight.gpu import Findings, GpuRequest, judge, parse
from vllmd.preflight.report import Gpu

pytestmark = pytest.mark.unit

COOL = Gpu(
    0, "H100", "GPU-aaaa-1", memory_total_mib=80000, memory_free_mib=79000, temperature_c=40, utilization_pct=0, pstate=0,
    clocks_event_reasons_active="0x0000000000000001", compute_capability="9.0", driver_version="570.86.15",
)  # fmt: skip
SECOND = replace(COOL, index=1, uuid="GPU-bbbb-2")
ALL_GATES = frozenset({"temperature", "memory", "utilization"})


def test_a_cool_idle_gpu_has_neither_warning_nor_failure() -> None:
    found = gates.check([COOL], "all", Limits(fail_on=ALL_GATES, memory_fraction=0.92))
    assert (found.failures, found.warnings, found.gpus) == ((), (), (COOL,))


@pytest.mark.parametrize(
    ("change", "gate", "word"),
    [
        ({"temperature_c": 86}, "temperature", "temperature 86 °C is above 85 °C"),
        ({"utilization_pct": 96}, "utilization", "utilization 96 % is above 95 %"),
        ({"memory_free_mib": 73599}, "memory", "73599 MiB free, 73600 MiB needed"),
    ],
)
def test_a_threshold_warns_and_refuses_only_where_it_is_named(change: dict[str, int], gate: str, word: str) -> None:
    gpu = replace(COOL, **change)  # type: ignore[arg-type]
    limits = Limits(memory_fraction=0.92)
    assert gates.check([gpu], "all", limits).failures == ()
    assert len(gates.warnings_of(gpu, limits)) == 1
    found = gates.check([gpu], "all", replace(limits, fail_on=frozenset({gate})))
    assert [word in failure for failure in found.failures] == [True]
    assert gates.warnings_of(gpu, replace(limits, fail_on=frozenset({gate}))) == []


@pytest.mark.parametrize("change", [{"temperature_c": 85}, {"utilization_pct": 95}, {"memory_free_mib": 73600}])
def test_the_threshold_itself_is_allowed(change: dict[str, int]) -> None:
    gpu = replace(COOL, **change)  # type: ignore[arg-type]
    assert gates.check([gpu], "all", Limits(fail_on=ALL_GATES, memory_fraction=0.92)).failures == ()


def test_memory_in_use_warns_above_its_percentage() -> None:
    half = replace(COOL, memory_free_mib=40000)
    assert gates.warnings_of(half, Limits()) == []
    assert "51 % of its memory" in gates.warnings_of(replace(half, memory_free_mib=39200), Limits())[0]
    assert gates.warnings_of(replace(half, memory_free_mib=39200), Limits(warn_pct=60)) == []


def test_a_number_of_mib_replaces_the_engines_share() -> None:
    limits = Limits(fail_on=frozenset({"memory"}), min_free_mib=4096, memory_fraction=0.92)
    assert gates.check([replace(COOL, memory_free_mib=4096)], "all", limits).failures == ()
    assert len(gates.check([replace(COOL, memory_free_mib=4095)], "all", limits).failures) == 1


def test_while_the_old_server_holds_the_memory_the_gate_asks_for_the_total() -> None:
    limits = Limits(fail_on=frozenset({"memory"}), min_free_mib=79000)
    full = replace(COOL, memory_free_mib=100)
    assert gates.check([full], "all", limits, "total").failures == ()
    assert gates.check([full], "all", limits, "free").failures != ()
    assert gates.check([full], "all", replace(limits, min_free_mib=90000), "total").failures != ()


def test_a_figure_that_is_missing_fails_its_gate_but_unified_memory_only_a_number() -> None:
    bare = Gpu(0, "GB10")
    found = gates.check([bare], "all", Limits(fail_on=ALL_GATES, memory_fraction=0.9))
    assert len(found.failures) == 2
    assert not any("memory" in failure for failure in found.failures)
    assert len(gates.check([bare], "all", Limits(fail_on=ALL_GATES, min_free_mib=1)).failures) == 3


@pytest.mark.parametrize("word", ["lost", "reset_required", "reboot_required"])
def test_a_gpu_that_is_lost_refuses_whatever_the_settings(word: str) -> None:
    assert word.replace("_", " ") in gates.check([COOL, replace(SECOND, lost=word)], "all", Limits()).failures[0]


def test_only_the_gpus_of_the_instance_count() -> None:
    hot = replace(SECOND, temperature_c=99)
    limits = Limits(fail_on=frozenset({"temperature"}))
    assert gates.check([COOL, hot], "all", limits).failures != ()
    for wanted in (("0",), ("GPU-aaaa",)):
        found = gates.check([COOL, hot], wanted, limits)
        assert ([gpu.index for gpu in found.gpus], found.failures) == ([0], ())
    assert gates.check([COOL, hot], ("1",), limits).failures != ()


def test_with_a_number_that_many_must_be_usable() -> None:
    hot = replace(SECOND, temperature_c=99)
    limits = Limits(fail_on=frozenset({"temperature"}))
    one = gates.check([COOL, hot], 1, limits)
    assert (one.failures, len(one.warnings)) == ((), 1)
    assert gates.check([COOL, hot], 2, limits).failures != ()
    assert "3 GPUs are wanted" in gates.check([COOL, hot], 3, limits).failures[0]


def test_a_gpu_that_is_not_there_refuses_and_a_mig_device_takes_all() -> None:
    assert "no GPU 7" in gates.check([COOL], ("7",), Limits()).failures[0]
    assert len(gates.check([COOL, SECOND], ("MIG-1234",), Limits()).gpus) == 2


@pytest.mark.parametrize(("reasons", "warns"), [("0x0000000000000000", False), ("0x1", False), ("0x41", True), ("0x80", True), ("", False), ("x", False)])
def test_clocks_that_are_held_down_warn_and_idle_ones_do_not(reasons: str, warns: bool) -> None:
    assert bool(gates.warnings_of(replace(COOL, clocks_event_reasons_active=reasons), Limits())) is warns


FINE = Findings("nvml", (COOL,), cuda_result=0, cuda_devices=1, cuda_driver=12080)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cuda_devices": 0}, "no device"),
        ({"cuda_result": 100, "cuda_devices": 0, "gpus": (), "source": "skipped"}, "no device"),
        ({"cuda_result": 803}, "cuInit answers 803"),
        ({"hung_in": "nvml", "gpus": (), "source": "skipped"}, "did not answer within 45 s (stuck in nvml)"),
        ({"gpus": ()}, "there is no GPU"),
    ],
)
def test_a_driver_that_cannot_be_used_refuses(change: dict[str, object], word: str) -> None:
    found = judge(GpuRequest(), replace(FINE, **change))  # type: ignore[arg-type]
    assert word in found.failures[0]
    assert found.hint


def test_without_a_driver_the_check_is_skipped_with_a_warning_unless_gpus_were_named() -> None:
    nothing = Findings(notes=("NVML: not found",))
    skipped = judge(GpuRequest(limits=Limits(fail_on=ALL_GATES)), nothing)
    assert (skipped.source, skipped.failures, "skipped" in skipped.warnings[0]) == ("skipped", (), True)
    for wanted in (2, ("0",)):
        assert judge(GpuRequest(wanted=wanted), nothing).failures


def test_lines_of_the_probe_become_facts_and_nonsense_is_passed_over() -> None:
    gpu = {"index": 1, "name": "n" * 500, "temperature_c": "hot", "memory_free_mib": 5, "pstate": True, "unknown": {}, "lost": "lost"}
    lines = [{"stage": "libcuda"}, {"cuda": {"result": 0, "devices": 2, "driver": 13000}}, {"stage": "nvml"}, {"source": "nvml", "gpus": [gpu, 7]}]
    text = "\n".join(["not json", "[]", "[" * 100000, *map(json.dumps, lines)])
    found = parse(text, timed_out=False)
    assert (found.cuda_devices, found.cuda_driver, found.source, found.hung_in) == (2, 13000, "nvml", "")
    [one] = found.gpus
    assert (one.index, len(one.name), one.temperature_c, one.memory_free_mib, one.pstate, one.lost) == (1, 128, None, 5, None, "lost")
    assert parse(text, timed_out=True).hung_in == "nvml"
    assert parse(text + '\n{"done": true}', timed_out=True).hung_in == ""


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("8.0", "9.0"), "9.0", True),
        (("8.0",), "8.6", True),
        (("8.6",), "8.0", False),
        (("8.0", "9.0"), "12.0", False),
        (("8.0", "9.0+PTX"), "12.0", True),
        (("9.0a",), "9.0", True),
        (("10.0a",), "10.3", False),
        (("10.0f",), "10.3", True),
        (("sm_120",), "12.0", True),
        (("sm_90", "compute_90"), "10.0", True),
        (("compute_120",), "9.0", False),
        ((), "9.0", True),
        (("garbage",), "9.0", True),
        (("9.0",), "", True),
    ],
)
def test_an_engine_runs_only_on_what_it_was_built_for(archs: tuple[str, ...], capability: str, runs: bool) -> None:
    found = misfits("", archs, [replace(COOL, compute_capability=capability)])
    assert [each.is_certain for each in found] == ([] if runs else [True])


@pytest.mark.parametrize(
    ("cuda", "driver", "cuda_driver", "fits"),
    [
        ("12.8", "525.60.13", 0, True),
        ("12.8", "520.10", 0, False),
        ("13.0", "575.51", 0, False),
        ("13.0", "580.65.06", 0, True),
        ("13.0", "575.51", 13000, True),
        ("13.0", "580.65.06", 12080, False),
        ("", "470.1", 0, True),
        ("13.0", "", 0, True),
    ],
)
def test_a_driver_older_than_the_engines_cuda_is_said(cuda: str, driver: str, cuda_driver: int, fits: bool) -> None:
    found = misfits(cuda, (), [replace(COOL, driver_version=driver)], cuda_driver)
    assert [each.is_certain for each in found] == ([] if fits else [False])


def test_a_misfit_refuses_the_start_where_it_is_certain_and_warns_where_it_is_not() -> None:
    assert "not built for GPU 0" in judge(GpuRequest(archs=("8.0",)), FINE).failures[0]
    warned = judge(GpuRequest(cuda="13.0"), FINE)
    assert (warned.failures, "driver" in warned.warnings[0]) == ((), True)
