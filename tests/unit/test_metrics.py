"""Our metrics: every row is shown, nothing else is, promtool finds them clean, and no snapshot of a GPU can break them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import promtool
from tests.unit.expositions import UUID, VLLM, facts, gpu, names, ours, snapshot
from vllmd.instance.metric_gpus import gpu_samples
from vllmd.instance.metric_rows import METRICS, with_table
from vllmd.instance.metric_samples import unix_time
from vllmd.instance.metrics import exposition

pytestmark = pytest.mark.unit

DOCS = Path(__file__).resolve().parents[2] / "docs/metrics.md"


def test_every_row_is_shown_with_its_labels_and_nothing_else(tmp_path: Path) -> None:
    found = names(ours(tmp_path))
    assert found == {name: {"name", *row.labels} for name, row in METRICS.items()}


def test_the_table_in_the_documentation_is_what_the_rows_say() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python -m vllmd.instance.metric_rows"
    assert text.count("| `vllmd_") == len(METRICS)


def test_promtool_finds_the_whole_exposition_clean(tmp_path: Path) -> None:
    checked = promtool.run("check", "metrics", stdin=ours(tmp_path))
    assert (checked.returncode, checked.stdout) == (0, "")


def test_types_are_told(tmp_path: Path) -> None:
    text = ours(tmp_path)
    for name, row in METRICS.items():
        assert f"# TYPE {name} {row.kind}\n" in text
        assert f"# HELP {name} " in text


def test_names_are_not_those_of_vllm() -> None:
    assert not {name for name in names(VLLM.read_text()) if name.startswith("vllmd_")}


def values(document: Any, *owned: str) -> dict[tuple[str, str], float]:
    """By metric and the labels beside the GPU's."""
    found: dict[tuple[str, str], float] = {}
    for metric, labels, value in gpu_samples(document, owned):
        rest = ",".join(text for label, text in labels.items() if label != "gpu")
        assert (metric, rest) not in found
        found[metric, rest] = value
    return found


def test_a_gpu_is_shown_in_base_units() -> None:
    found = values(snapshot(gpu()), UUID)
    assert found["vllmd_gpu_memory_used_bytes", ""] == 120000 << 20
    assert found["vllmd_gpu_utilization_ratio", ""] == pytest.approx(0.97)
    assert found["vllmd_gpu_owned", ""] == 1
    assert found["vllmd_gpu_verdict", "ok"] == 1
    assert found["vllmd_gpu_verdict", "reset"] == 0
    assert found["vllmd_gpu_ecc_errors_total", "corrected"] == 3
    assert found["vllmd_gpu_clock_limited", "software_thermal"] == 1
    assert found["vllmd_gpu_snapshot_time_seconds", ""] == pytest.approx(1767323045.678)


def test_a_sick_gpu_of_somebody_else_is_shown_too() -> None:
    sick = gpu(verdict={"class": "reset"}, quarantine={"class": "reset"}, lost="fallen off the bus", remapped={"pending": 1, "failed": True})
    found = values(snapshot(sick, stuck_in="nvmlDeviceGetMemoryInfo"))
    assert found["vllmd_gpu_owned", ""] == 0
    assert found["vllmd_gpu_verdict", "reset"] == found["vllmd_gpu_quarantined", ""] == found["vllmd_gpu_lost", ""] == 1
    assert found["vllmd_gpu_row_remap_pending", ""] == found["vllmd_gpu_row_remap_failed", ""] == found["vllmd_gpu_driver_stuck", ""] == 1
    assert found["vllmd_gpu_verdict", "ok"] == 0


def test_a_gpu_is_owned_by_whoever_has_a_part_of_it() -> None:
    assert values(snapshot(gpu(mig=[{"uuid": "MIG-1"}])), "MIG-1")["vllmd_gpu_owned", ""] == 1


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    found = values(snapshot({"uuid": "GPU-1", "temperature_c": None, "power_w": float("nan"), "ecc": None, "pcie": []}, at=None, driver_version=None))
    assert ("vllmd_gpu_temperature_celsius", "") not in found
    assert ("vllmd_gpu_power_watts", "") not in found
    assert ("vllmd_gpu_snapshot_time_seconds", "") not in found
    assert found["vllmd_gpu_lost", ""] == 0


def test_no_watch_of_gpus_no_metrics_of_gpus() -> None:
    assert values(None) == {}


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8)
FIELDS = st.fixed_dictionaries({}, optional=dict.fromkeys((*gpu(), "uuid"), JSON))
DOCUMENTS = JSON | st.fixed_dictionaries({}, optional={"at": JSON, "stuck_in": JSON, "driver_version": JSON, "gpus": JSON | st.lists(JSON | FIELDS | FIELDS.map(lambda more: gpu(**more)), max_size=3)})


@settings(max_examples=150)
@given(DOCUMENTS)
def test_a_snapshot_that_is_nonsense_is_shown_without_its_nonsense(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    """One sample given twice, or one that is no number, and Prometheus takes none of them."""
    known = facts(tmp_path_factory.getbasetemp())
    known.vitals.gpus = document
    text = exposition(known).decode()
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples))
    assert "vllmd_ready{" in text


def test_times_of_every_form_are_understood() -> None:
    assert unix_time(5) == 5.0
    assert unix_time("1970-01-01T00:01:00.000Z") == 60.0
    assert unix_time("yesterday") is None
    assert unix_time(None) is None
    assert unix_time(value=True) is None
