"""What holds of a GPU now, read from one snapshot and the one before: what it has lost, what its memory, links and clocks say.

A condition has a key: while it holds it is found once (core/gpu_book.py), however many snapshots show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllmd.config.settings import GpuWatch
from vllmd.core import xids
from vllmd.core.gpu_findings import Finding
from vllmd.core.xids import HINTS, Class

Gpu = Mapping[str, Any]
"""One of the document's (docs/gpu.md). It comes from another process: what is missing says nothing."""

HARDWARE_SLOWDOWN, THERMAL, POWER_BRAKE = 0x8, 0x40, 0x80
CLOCK_REASONS = {
    0x1: "idle",
    0x2: "applications_clocks",
    0x4: "software_power_cap",
    HARDWARE_SLOWDOWN: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "software_thermal",
    THERMAL: "hardware_thermal",
    POWER_BRAKE: "power_brake",
    0x100: "display_clocks",
}


def clock_reasons(mask: int) -> list[str]:
    """Their names; one that has none is its bit."""
    return [CLOCK_REASONS.get(1 << bit, hex(1 << bit)) for bit in range(mask.bit_length()) if mask >> bit & 1]


@dataclass(frozen=True, slots=True)
class Condition:
    key: str
    detector: str
    cls: Class
    what: str
    hint: str = ""
    fatal: bool = False

    def finding(self, gpu: Gpu, at: float) -> Finding:
        return Finding(text(gpu, "uuid"), text(gpu, "pci"), self.detector, 0, self.cls, fatal=self.fatal, what=self.what, hint=self.hint or HINTS[self.cls], at=at)


def conditions(gpu: Gpu, before: Gpu, elapsed_s: float, limits: GpuWatch) -> list[Condition]:
    """`before`: the same GPU in the snapshot before, {} for the first."""
    return [*_recovery(gpu), *_memory(gpu, before, limits), *_clocks(gpu), *_links(gpu, before, elapsed_s, limits)]


def _recovery(gpu: Gpu) -> Iterator[Condition]:
    """The driver's own verdict, and its refusal to answer."""
    action = number(gpu, "recovery_action") or 0
    if action > 0:
        row = xids.recovery(int(action))
        yield Condition(f"recovery {action:g}", "gpu_xid", row.cls, row.what, fatal=row.fatal)
    match text(gpu, "lost"):
        case "lost":
            yield Condition("lost", "gpu_lost", "reboot", "the driver says that the GPU is lost", fatal=True)
        case "reset_required":
            yield Condition("reset required", "gpu_lost", "reset", "the driver refuses every call until the GPU is reset", fatal=True)


def _memory(gpu: Gpu, before: Gpu, limits: GpuWatch) -> Iterator[Condition]:
    rows = part(gpu, "remapped")
    if rows.get("failed"):
        yield Condition("remap failed", "gpu_remap", "replace", "a broken row of memory could not be remapped", fatal=True)
    if rows.get("pending"):
        yield Condition("remap pending", "gpu_remap", "warn", "broken rows of memory wait to be remapped, which a reset does")
    remapped = number(rows, "uncorrectable") or 0
    if remapped >= limits.remapped_rows_warn:
        yield Condition("remapped rows", "gpu_remap", "warn", f"{remapped:g} rows of memory were remapped (a warning from {limits.remapped_rows_warn})", "The GPU runs out of spare rows: plan its replacement.")
    retired = number(gpu, "retired_pages") or 0
    if retired >= limits.retired_pages_fail:
        yield Condition("retired pages", "gpu_remap", "replace", f"{retired:g} pages of memory were retired ({limits.retired_pages_fail} are the end)", fatal=True)
    now, was = number(part(gpu, "ecc"), "uncorrected"), number(part(before, "ecc"), "uncorrected")
    if now is not None and was is not None and now > was:
        what = f"{now - was:g} new uncorrectable memory errors (ECC), {now:g} since the driver was loaded"
        yield Condition("ecc", "gpu_ecc", "warn", what, "The Xid beside it says whether the engine survives. If they go on, reset the GPU, then suspect it.")


def _clocks(gpu: Gpu) -> Iterator[Condition]:
    reasons = gpu.get("clock_reasons")
    slow = set(reasons) if isinstance(reasons, list) and all(isinstance(each, str) for each in reasons) else set()
    if "power_brake" in slow:
        yield Condition("power brake", "gpu_power", "warn", "the GPU is slowed down because its power supply says so", "Look at power supplies and cables; the host's BMC has a log.")
    if "hardware_thermal" in slow:
        degrees = number(gpu, "temperature_c")
        at = "" if degrees is None else f" at {degrees:g} °C"
        yield Condition("thermal", "gpu_thermal", "warn", f"the GPU is slowed down because it is too hot{at}", "Look at fans, airflow and the room's temperature.")
    if "hardware_slowdown" in slow and not slow & {"power_brake", "hardware_thermal"}:
        yield Condition("slowdown", "gpu_thermal", "warn", "the GPU's hardware halves its clocks", "Temperature or power: `nvidia-smi -q -d PERFORMANCE` says which.")


def _links(gpu: Gpu, before: Gpu, elapsed_s: float, limits: GpuWatch) -> Iterator[Condition]:
    now, was = number(part(gpu, "nvlink"), "crc_errors"), number(part(before, "nvlink"), "crc_errors")
    if now is not None and was is not None and elapsed_s > 0 and (now - was) / elapsed_s > limits.nvlink_crc_per_s:
        yield Condition("nvlink crc", "gpu_nvlink", "nvlink", f"{(now - was) / elapsed_s:.0f} checksum errors a second on its NVLinks")
    bus, past = part(gpu, "pcie"), part(before, "pcie")
    if (narrow := _narrow(bus)) and _narrow(past):  # twice: a link that is being trained is narrow for a moment
        yield Condition("pcie", "gpu_pcie", "warn", f"its PCIe link has {narrow:g} of {bus['max_width']} lanes", "Reseat the card or its riser; a slot that is wired for fewer lanes is not at fault.")
    fabric = text(gpu, "fabric")
    if fabric and fabric not in ("completed", "in progress") and fabric == text(before, "fabric"):
        yield Condition("fabric", "gpu_fabric", "warn", f"the GPU is not part of its NVLink fabric ({fabric})", "Engines on several GPUs fail so: `systemctl status nvidia-fabricmanager`.")


def _narrow(bus: Gpu) -> float:
    """Lanes, where they are fewer than there could be; else 0. An idle link is slow, never narrow."""
    width, most = number(bus, "width"), number(bus, "max_width")
    return width if width and most and width < most else 0.0


def number(words: Mapping[str, Any], key: str) -> float | None:
    value = words.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE else None


_HUGE = 1e18
"""No figure of a GPU is as large; infinity, and what no float can hold, are none either."""


def text(words: Mapping[str, Any], key: str) -> str:
    value = words.get(key)
    return value if isinstance(value, str) else ""


def part(words: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = words.get(key)
    return value if isinstance(value, dict) else {}
