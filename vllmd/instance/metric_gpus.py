"""The snapshot of the GPU watch as samples. It comes from another process: what is missing or of another type is left out."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

from vllmd.instance.metric_samples import Sample, one_of, unix_time

CLASSES = ("ok", "warn", "suspect", "reset", "reboot", "replace", "lost")
_MIB = 1 << 20
_PLAIN = (
    ("vllmd_gpu_memory_size_bytes", "memory_total_mib", _MIB),
    ("vllmd_gpu_memory_used_bytes", "memory_used_mib", _MIB),
    ("vllmd_gpu_temperature_celsius", "temperature_c", 1),
    ("vllmd_gpu_power_watts", "power_w", 1),
    ("vllmd_gpu_utilization_ratio", "utilization_pct", 0.01),
    ("vllmd_gpu_retired_pages_total", "retired_pages", 1),
)


def gpu_samples(snapshot: Mapping[str, Any] | None, ours: Container[str]) -> Iterator[Sample]:
    """`ours`: UUIDs of the GPUs, or of the MIG parts, that this instance uses."""
    if not isinstance(snapshot, dict):
        return
    at = unix_time(snapshot.get("at"))
    if at is not None:
        yield "vllmd_gpu_snapshot_time_seconds", {}, at
    yield "vllmd_gpu_driver_stuck", {}, float(bool(snapshot.get("stuck_in")))
    seen: set[str] = set()
    for gpu in _list(snapshot.get("gpus")):
        uuid = gpu.get("uuid") if isinstance(gpu, dict) else None
        if isinstance(uuid, str) and uuid not in seen:  # a sample given twice makes Prometheus refuse all of them
            seen.add(uuid)
            yield from _gpu(gpu, uuid, ours, _text(snapshot.get("driver_version")))


def _gpu(gpu: Mapping[str, Any], uuid: str, ours: Container[str], driver: str) -> Iterator[Sample]:
    label = {"gpu": uuid}
    about = {"index": _text(gpu.get("index")), "pci": _text(gpu.get("pci")), "product": _text(gpu.get("name")), "driver": driver}
    yield "vllmd_gpu_info", label | about, 1
    parts = [part.get("uuid") for part in _list(gpu.get("mig")) if isinstance(part, dict)]
    yield "vllmd_gpu_owned", label, float(any(isinstance(each, str) and each in ours for each in (uuid, *parts)))
    for metric, key, factor in _PLAIN:
        value = _number(gpu.get(key))
        if value is not None:
            yield metric, label, value * factor
    for reason in dict.fromkeys(_text(each) for each in _list(gpu.get("clock_reasons"))):
        yield "vllmd_gpu_clock_limited", {**label, "reason": reason}, 1
    yield from _errors(gpu, label)
    link = _mapping(gpu.get("pcie"))
    for metric, key in (("vllmd_gpu_pcie_link_width", "width"), ("vllmd_gpu_pcie_link_width_max", "max_width")):
        width = _number(link.get(key))
        if width is not None:
            yield metric, label, width
    yield "vllmd_gpu_lost", label, float(bool(gpu.get("lost")))
    yield from one_of("vllmd_gpu_verdict", "class", CLASSES, _text(_mapping(gpu.get("verdict")).get("class")), **label)
    yield "vllmd_gpu_quarantined", label, float(bool(gpu.get("quarantine")))


def _errors(gpu: Mapping[str, Any], label: Mapping[str, str]) -> Iterator[Sample]:
    ecc, rows = _mapping(gpu.get("ecc")), _mapping(gpu.get("remapped"))
    for metric, counts, kinds in (
        ("vllmd_gpu_ecc_errors_total", ecc, ("corrected", "uncorrected")),
        ("vllmd_gpu_remapped_rows_total", rows, ("correctable", "uncorrectable")),
    ):
        for kind in kinds:
            count = _number(counts.get(kind))
            if count is not None:
                yield metric, {**label, "type": kind}, count
    crc = _number(_mapping(gpu.get("nvlink")).get("crc_errors"))
    if crc is not None:
        yield "vllmd_gpu_nvlink_crc_errors_total", label, crc
    for what in ("pending", "failed"):
        if isinstance(rows.get(what), bool | int):
            yield f"vllmd_gpu_row_remap_{what}", label, float(bool(rows[what]))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18 else None  # isfinite() itself raises for 10**400


def _text(value: object) -> str:
    return str(value) if isinstance(value, str | int) else ""


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
