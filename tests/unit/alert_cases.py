"""For each alert: figures that must raise it, and figures close to them that must not. promtool evaluates them minute by minute.

Series are in promtool's notation: `1x20` is 1 for 21 minutes, `0+5x20` grows by 5 a minute.
"""

from __future__ import annotations

from dataclasses import dataclass

Series = dict[str, str]


@dataclass(frozen=True, slots=True)
class Case:
    """`at`: minutes after which it is asked; `count` alerts fire then of `raises`, none of `spares`."""

    alert: str
    at: int
    raises: Series
    spares: Series
    count: int = 1


N = 'name="a",instance="h:1"'
G = 'gpu="GPU-1",instance="h:1"'


def _ready(values: str, **more: str) -> Series:
    return {f"vllmd_ready{{{N}}}": values, f"vllmd_paused{{{N}}}": "0x300", **more}


CASES = (
    Case("VllmdInstanceNotReady", 40, _ready("1x30 0x30"), _ready("0x60")),
    Case("VllmdInstanceNotReady", 40, _ready("1x30 0x30"), _ready("1x36 0x30")),
    Case("VllmdInstanceNotReady", 40, _ready("1x30 0x30"), {f"vllmd_ready{{{N}}}": "1x30 0x30", f"vllmd_paused{{{N}}}": "1x60"}),
    Case("VllmdInstanceGone", 10, {'up{job="vllmd",name="a"}': "0x20"}, {'up{job="other"}': "0x20"}),
    Case(
        "VllmdRestartLoop",
        60,
        {f"vllmd_supervisor_start_time_seconds{{{N}}}": "1x10 2x10 3x10 4x60"},
        {f"vllmd_supervisor_start_time_seconds{{{N}}}": "1x10 2x10 3x90"},
    ),
    Case(
        "VllmdStartTooLong",
        45,
        {f"vllmd_ready{{{N}}}": "0x60", f'vllmd_state{{{N},state="unconfigured"}}': "0x60", f"vllmd_supervisor_start_time_seconds{{{N}}}": "0x60"},
        {
            f"vllmd_ready{{{N}}}": "0x60",
            f'vllmd_state{{{N},state="unconfigured"}}': "0x60",
            f"vllmd_supervisor_start_time_seconds{{{N}}}": "0x60",
            f'vllmd_transfer_speed_bytes_per_second{{{N},phase="fetch"}}': "1000x60",
        },
    ),
    Case(
        "VllmdStartTooLong",
        45,
        {f"vllmd_ready{{{N}}}": "0x60", f'vllmd_state{{{N},state="unconfigured"}}': "0x60", f"vllmd_supervisor_start_time_seconds{{{N}}}": "0x60"},
        {f"vllmd_ready{{{N}}}": "0x60", f'vllmd_state{{{N},state="unconfigured"}}': "1x60", f"vllmd_supervisor_start_time_seconds{{{N}}}": "0x60"},
    ),
    Case(
        "VllmdHung",
        30,
        {f'vllmd_last_failure_time_seconds{{{N},cause="engine_hung"}}': "60x60"},
        {f'vllmd_last_failure_time_seconds{{{N},cause="engine_exited"}}': "60x60"},
    ),
    Case(
        "VllmdFailed",
        10,
        {f'vllmd_last_failure_time_seconds{{{N},cause="engine_exited"}}': "60x60"},
        {f'vllmd_last_failure_time_seconds{{{N},cause="engine_exited"}}': "-6000x60"},
    ),
    Case(
        "VllmdSettingsWait", 1500, {f"vllmd_settings_waiting_for_restart{{{N}}}": "2x1600"}, {f"vllmd_settings_waiting_for_restart{{{N}}}": "0x800 2x800"}
    ),
    Case(
        "VllmdHeartbeatStale",
        5,
        {f"vllmd_engine_heartbeat_age_seconds{{{N}}}": "0x2 40x10", f"vllmd_watch_hang_timeout_seconds{{{N}}}": "60x20"},
        {f"vllmd_engine_heartbeat_age_seconds{{{N}}}": "0x2 20x10", f"vllmd_watch_hang_timeout_seconds{{{N}}}": "60x20"},
    ),
    Case(
        "VllmdHeartbeatStale",
        5,
        {f"vllmd_engine_heartbeat_age_seconds{{{N}}}": "40x10", f"vllmd_watch_hang_timeout_seconds{{{N}}}": "60x20"},
        {f"vllmd_engine_heartbeat_age_seconds{{{N}}}": "40x10", f"vllmd_watch_hang_timeout_seconds{{{N}}}": "0x20"},
    ),
    Case(
        "VllmdHeartbeatUnreadable",
        20,
        _ready("1x60", **{f'vllmd_engine_scrape_outcome{{{N},outcome="absent"}}': "1x60", f'vllmd_engine_scrape_outcome{{{N},outcome="ok"}}': "0x60"}),
        _ready("1x60", **{f'vllmd_engine_scrape_outcome{{{N},outcome="absent"}}': "0x60", f'vllmd_engine_scrape_outcome{{{N},outcome="sleeping"}}': "1x60"}),
    ),
    Case(
        "VllmdProofOfLifeFails",
        20,
        {f'vllmd_canaries_total{{{N},outcome="timeout"}}': "0x10 1x60"},
        {f'vllmd_canaries_total{{{N},outcome="ok"}}': "0+1x60", f'vllmd_canaries_total{{{N},outcome="timeout"}}': "1x60"},
    ),
    Case(
        "VllmdWouldHaveActed",
        30,
        {f'vllmd_verdicts_total{{{N},detector="hang",result="observed"}}': "0x10 1x60"},
        {f'vllmd_verdicts_total{{{N},detector="hang",result="acted"}}': "0x10 1x60"},
    ),
    Case("VllmdPausedLong", 250, {f"vllmd_paused{{{N}}}": "1x300"}, {f"vllmd_paused{{{N}}}": "0x100 1x200"}),
    Case(
        "VllmdGpuQuarantined",
        5,
        {f'vllmd_gpu_quarantined{{{G},name="a"}}': "1x20", f'vllmd_gpu_quarantined{{{G},name="b"}}': "1x20"},
        {f'vllmd_gpu_quarantined{{{G},name="a"}}': "0x20"},
    ),
    Case("VllmdGpuQuarantined", 5, {f'vllmd_gpu_watch_quarantined{{{G},class="reboot"}}': "1x20"}, {f'vllmd_gpu_watch_quarantined{{{G},class="reboot"}}': "0x20"}),
    Case("VllmdGpuSick", 5, {f'vllmd_gpu_verdict{{{G},name="a",class="reset"}}': "1x20"}, {f'vllmd_gpu_verdict{{{G},name="a",class="warn"}}': "1x20"}),
    Case("VllmdGpuHot", 10, {f'vllmd_gpu_temperature_celsius{{{G},name="a"}}': "92x20"}, {f'vllmd_gpu_temperature_celsius{{{G},name="a"}}': "80x20"}),
    Case(
        "VllmdGpuSlowed",
        10,
        {f'vllmd_gpu_clock_limited{{{G},name="a",reason="hardware_thermal"}}': "1x20"},
        {f'vllmd_gpu_clock_limited{{{G},name="a",reason="software_power_cap"}}': "1x20"},
    ),
    Case(
        "VllmdGpuMemoryErrors",
        20,
        {f'vllmd_gpu_ecc_errors_total{{{G},name="a",type="uncorrected"}}': "4x10 5x60"},
        {f'vllmd_gpu_ecc_errors_total{{{G},name="a",type="corrected"}}': "4x10 5x60", f'vllmd_gpu_ecc_errors_total{{{G},name="a",type="uncorrected"}}': "9x60"},
    ),
    Case("VllmdGpuNeedsReplacement", 5, {f'vllmd_gpu_row_remap_failed{{{G},name="a"}}': "1x20"}, {f'vllmd_gpu_row_remap_failed{{{G},name="a"}}': "0x20"}),
    Case("VllmdGpuWantsReset", 20, {f'vllmd_gpu_row_remap_pending{{{G},name="a"}}': "1x30"}, {f'vllmd_gpu_row_remap_pending{{{G},name="a"}}': "0x30"}),
    Case("VllmdGpuDriverStuck", 5, {f"vllmd_gpu_driver_stuck{{{N}}}": "1x20"}, {f"vllmd_gpu_driver_stuck{{{N}}}": "0x20"}),
    Case("VllmdGpuDriverStuck", 20, {f"vllmd_gpu_snapshot_time_seconds{{{N}}}": "60x40"}, {f"vllmd_gpu_snapshot_time_seconds{{{N}}}": "0+60x40"}),
    Case(
        "VllmdDrops", 20, {f'vllmd_dropped_total{{{N},what="journal"}}': "0x10 7x60"}, {f'vllmd_dropped_total{{{N},what="journal"}}': "7x60"}
    ),
    Case("VllmdSupervisorLarge", 20, {f"vllmd_private_memory_bytes{{{N}}}": "200000000x30"}, {f"vllmd_private_memory_bytes{{{N}}}": "30000000x30"}),
    Case(
        "VllmdTextfileStale",
        30,
        {'node_textfile_mtime_seconds{file="/run/vllmd/metrics/vllmd-a.prom",instance="h:9100"}': "60x60"},
        {'node_textfile_mtime_seconds{file="/var/smart.prom",instance="h:9100"}': "60x60"},
    ),
    Case("VllmKvCacheFull", 20, {f"vllm:kv_cache_usage_perc{{{N}}}": "0.99x30"}, {f"vllm:kv_cache_usage_perc{{{N}}}": "0.9x30"}),
    Case("VllmQueueLong", 20, {f"vllm:num_requests_waiting{{{N}}}": "80x30"}, {f"vllm:num_requests_waiting{{{N}}}": "20x30"}),
    Case(
        "VllmErrors",
        20,
        {f'vllm:request_success_total{{{N},finished_reason="error"}}': "0+5x30"},
        {f'vllm:request_success_total{{{N},finished_reason="stop"}}': "0+5x30"},
    ),
    Case(
        "VllmHttpErrors",
        20,
        {f'http_requests_total{{{N},job="vllm",status="5xx"}}': "0+10x30", f'http_requests_total{{{N},job="vllm",status="2xx"}}': "0+50x30"},
        {f'http_requests_total{{{N},job="vllm",status="5xx"}}': "0+1x30", f'http_requests_total{{{N},job="vllm",status="2xx"}}': "0+50x30"},
    ),
    Case("VllmPreempts", 30, {f"vllm:num_preemptions_total{{{N}}}": "0+60x60"}, {f"vllm:num_preemptions_total{{{N}}}": "0+1x60"}),
    Case(
        "VllmFirstTokenSlow",
        30,
        {
            f'vllm:time_to_first_token_seconds_bucket{{{N},le="10.0"}}': "0x60",
            f'vllm:time_to_first_token_seconds_bucket{{{N},le="20.0"}}': "0+9x60",
            f'vllm:time_to_first_token_seconds_bucket{{{N},le="+Inf"}}': "0+9x60",
        },
        {f'vllm:time_to_first_token_seconds_bucket{{{N},le="10.0"}}': "0+9x60", f'vllm:time_to_first_token_seconds_bucket{{{N},le="+Inf"}}': "0+9x60"},
    ),
)
