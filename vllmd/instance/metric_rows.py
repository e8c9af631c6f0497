"""One row per metric: its name, type, labels, and what it says. The exposition and the table in docs/metrics.md are made from it.

Every sample also has the label `name`, the instance: a textfile collector holds those of all instances of a host, and
`instance` is Prometheus' own label for the address that it scraped.

`python -m vllmd.instance.metric_rows` writes the table into docs/metrics.md; a test fails on drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` is as Prometheus sees it, with its unit, and _total for a counter. `labels`: besides `name`."""

    name: str
    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    text: str


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"vllmd_{name}", "gauge", labels, text)


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"vllmd_{name}_total", "counter", labels, text)


_ROWS = (
    # The instance.
    _gauge("info", "1; versions and names are in the labels", "version", "engine", "engine_version", "model"),
    _gauge("state", "1 for the state that the instance is in, 0 for the others", "state"),
    _gauge("state_change_time_seconds", "When the instance came into that state (Unix time)"),
    _gauge("ready", "1 while the engine answers, by all that is known"),
    _gauge("supervisor_start_time_seconds", "When the supervisor started (Unix time); a change is a restart of the instance"),
    _gauge("settings_waiting_for_restart", "Settings that were changed and reloaded, and apply only after a restart"),
    # The start.
    _gauge("start_phase_seconds", "Time that each phase of the last start took; of the phase under way, so far", "phase"),
    _gauge("start_duration_seconds", "From the supervisor's start until the engine was ready; absent until then"),
    _gauge("progress_ratio", "Progress of the present phase, 0 to 1; absent where the phase has none"),
    _gauge("transfer_done_bytes", "Bytes of the model that the present phase (fetch, verify) has done; absent in others", "phase"),
    _gauge("transfer_size_bytes", "Bytes of the model that the present phase (fetch, verify) has to do; absent in others", "phase"),
    _gauge("transfer_speed_bytes_per_second", "Speed of that over the last seconds; absent in other phases", "phase"),
    # The watch.
    _gauge("engine_heartbeat_age_seconds", "Stillness with work to do, of the rank that has stood still longest; absent until it is known"),
    _gauge("watch_hang_timeout_seconds", "watch.hang_timeout_s: how old the heartbeat may become; 0: it never counts"),
    _gauge("engine_requests_running", "Requests that the engine works at, as its heartbeat says"),
    _gauge("engine_requests_waiting", "Requests that wait in the engine, as its heartbeat says"),
    _gauge("engine_scrape_outcome", "1 for what the last reading of the heartbeat came to, 0 for the others", "outcome"),
    _counter("canaries", "Proofs of life asked of the idle engine, by what came back", "outcome"),
    _gauge("canary_duration_seconds", "How long the last good one took; absent until there was one"),
    _counter("verdicts", "Verdicts of the watch; result: acted (ended the instance), observed or paused (would have)", "detector", "result"),
    _counter("engine_process_deaths", "Processes of the engine that ended while it was ready, helpers included"),
    _gauge("paused", "1 while the watch is paused (vllmctl pause)"),
    # Keys.
    _gauge("api_keys", "Keys that clients may send; 0: none is asked for"),
    _counter("requests_refused", "Requests that the engine's guard refused: no key, one that cannot be read, a wrong one, or its keys cannot be read (503)", "reason"),
    # Failures, over all lives of the instance.
    _counter("failures", "Failures of the instance over all its lives, by cause", "cause"),
    _gauge("last_failure_time_seconds", "When the instance last failed of that cause (Unix time)", "cause"),
    # GPUs: all of the host, as the GPU watch sees them; absent without one.
    _gauge("gpu_snapshot_time_seconds", "When the GPUs were last looked at (Unix time)"),
    _gauge("gpu_driver_stuck", "1 while a call of the driver does not return"),
    _gauge("gpu_info", "1; what the GPU is, in the labels", "gpu", "index", "pci", "product", "driver"),
    _gauge("gpu_owned", "1 for a GPU that this instance uses", "gpu"),
    _gauge("gpu_memory_size_bytes", "Memory of the GPU", "gpu"),
    _gauge("gpu_memory_used_bytes", "Memory in use, by whomever", "gpu"),
    _gauge("gpu_temperature_celsius", "Temperature of the GPU", "gpu"),
    _gauge("gpu_power_watts", "Power that the GPU draws", "gpu"),
    _gauge("gpu_utilization_ratio", "Share of the time in which the GPU did something, 0 to 1", "gpu"),
    _gauge("gpu_clock_limited", "1 for each reason for which the clocks are lower than they could be", "gpu", "reason"),
    _counter("gpu_ecc_errors", "Memory errors that the GPU counted; type: corrected, uncorrected", "gpu", "type"),
    _counter("gpu_remapped_rows", "Rows of memory that were replaced, by the type of error", "gpu", "type"),
    _counter("gpu_retired_pages", "Pages of memory that were retired, on GPUs that cannot remap rows", "gpu"),
    _counter("gpu_nvlink_crc_errors", "Checksum errors on the GPU's NVLinks", "gpu"),
    _gauge("gpu_row_remap_pending", "1 when a row is replaced only at the next reset", "gpu"),
    _gauge("gpu_row_remap_failed", "1 when a row could not be replaced: the GPU must be", "gpu"),
    _gauge("gpu_pcie_link_width", "Lanes of the PCIe link in use", "gpu"),
    _gauge("gpu_pcie_link_width_max", "Lanes that it could have", "gpu"),
    _gauge("gpu_lost", "1 when the GPU does not answer any more", "gpu"),
    _gauge("gpu_verdict", "1 for the GPU's verdict (ok, warn, suspect, reset, reboot, replace, lost), 0 for the others", "gpu", "class"),
    _gauge("gpu_quarantined", "1 when no instance may start on it (vllmctl gpu says why)", "gpu"),
    # The supervisor itself.
    _counter("dropped", "Journal entries and lines of the engine that were not passed on", "what"),
    _gauge("private_memory_bytes", "Private memory of the supervisor"),
)

METRICS = {row.name: row for row in _ROWS}

_BEGIN, _END = "<!-- metrics: made by `python -m vllmd.instance.metric_rows` -->\n", "<!-- metrics: end -->\n"


def table() -> str:
    head = "| metric | type | labels | what it says |\n|---|---|---|---|\n"
    cells = ((f"`{row.name}`", row.kind, ", ".join(f"`{label}`" for label in row.labels), row.text) for row in _ROWS)
    return head + "".join(f"| {' | '.join(each)} |\n" for each in cells)


def with_table(document: str) -> str:
    """docs/metrics.md with the table as it must be."""
    before, _, rest = document.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{after}"


if __name__ == "__main__":
    page = Path(__file__).parents[2] / "docs/metrics.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
