"""Draws Grafana's dashboard: `python -m tools.dashboard` writes share/grafana/dashboards/vllmd.json; a test fails on drift.

A row here is a panel there. What Grafana fills in by itself is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.core.lifecycle import State

PATH = Path(__file__).parents[1] / "share/grafana/dashboards/vllmd.json"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_US = '{name=~"$name"}'
_GPUS = '* on (gpu) group_left (index) max by (gpu, index) (vllmd_gpu_info{name=~"$name"})'
_WIDTH, _HEIGHT = 24, 7
STATES = tuple(map(str, State))


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries` are (expression, legend); `width` of 24."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    text: str = ""
    max: float | None = None
    stack: bool = False


def _quantiles(metric: str, *quantiles: float) -> tuple[tuple[str, str], ...]:
    rate = f"sum by (name, le) (rate(vllm:{metric}_bucket{_US}[$__rate_interval]))"
    return tuple((f"histogram_quantile({q:g}, {rate})", f"{{{{name}}}} p{100 * q:g}") for q in quantiles)


def _gpu(metric: str) -> str:
    return f"max by (gpu) ({metric}{_US}) {_GPUS}"


_STATE = " + ".join(f'{number} * max by (name) (vllmd_state{{name=~"$name",state="{state}"}})' for number, state in enumerate(STATES))

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Instances",
        (
            Panel("State", ((_STATE, "{{name}}"),), kind="state-timeline", width=16, text="The life of each instance; red is examining, killing, stopped."),
            Panel("Ready", ((f"max by (name) (vllmd_ready{_US})", "{{name}}"),), kind="stat", width=4),
            Panel("Paused", ((f"max by (name) (vllmd_paused{_US})", "{{name}}"),), kind="stat", width=4, text="1: vllmctl pause; nobody watches."),
            Panel("Failures over all lives, by cause", ((f"max by (name, cause) (vllmd_failures_total{_US})", "{{name}} {{cause}}"),), kind="bargauge"),
            Panel("Restarts an hour", ((f"changes(vllmd_supervisor_start_time_seconds{_US}[1h])", "{{name}}"),), text="systemd gives up after six."),
            Panel("Phases of the last start", ((f"max by (name, phase) (vllmd_start_phase_seconds{_US})", "{{name}} {{phase}}"),), unit="s", kind="bargauge"),
        ),
    ),
    (
        "Traffic (vLLM)",
        (
            Panel(
                "Tokens a second",
                (
                    (f"sum by (name) (rate(vllm:generation_tokens_total{_US}[$__rate_interval]))", "{{name}} made"),
                    (f"sum by (name) (rate(vllm:prompt_tokens_total{_US}[$__rate_interval]))", "{{name}} read"),
                ),
            ),
            Panel(
                "Requests in the engine",
                (
                    (f"sum by (name) (vllm:num_requests_running{_US})", "{{name}} running"),
                    (f"sum by (name) (vllm:num_requests_waiting{_US})", "{{name}} waiting"),
                ),
            ),
            Panel(
                "Requests ended a second, by reason",
                ((f"sum by (name, finished_reason) (rate(vllm:request_success_total{_US}[$__rate_interval]))", "{{name}} {{finished_reason}}"),),
                unit="reqps",
            ),
            Panel("Time to the first token", _quantiles("time_to_first_token_seconds", 0.5, 0.95), unit="s"),
            Panel("Between two tokens", _quantiles("inter_token_latency_seconds", 0.5, 0.95), unit="s"),
            Panel("Whole requests", _quantiles("e2e_request_latency_seconds", 0.5, 0.95), unit="s"),
            Panel("KV cache in use", ((f"max by (name) (vllm:kv_cache_usage_perc{_US})", "{{name}}"),), unit="percentunit", max=1),
            Panel(
                "Prefix cache hits",
                (
                    (
                        f"sum by (name) (rate(vllm:prefix_cache_hits_total{_US}[$__rate_interval]))"
                        f" / sum by (name) (rate(vllm:prefix_cache_queries_total{_US}[$__rate_interval]))",
                        "{{name}}",
                    ),
                ),
                unit="percentunit",
                max=1,
            ),
            Panel(
                "In the queue; preemptions",
                (
                    *_quantiles("request_queue_time_seconds", 0.95),
                    (f"sum by (name) (rate(vllm:num_preemptions_total{_US}[$__rate_interval]))", "{{name}} preemptions a second"),
                ),
                unit="s",
            ),
            Panel(
                "HTTP answers a second, by status",
                (('sum by (name, status) (rate(http_requests_total{job="vllm",name=~"$name"}[$__rate_interval]))', "{{name}} {{status}}"),),
                unit="reqps",
            ),
        ),
    ),
    (
        "The watch",
        (
            Panel(
                "Age of the heartbeat",
                (
                    (f"max by (name) (vllmd_engine_heartbeat_age_seconds{_US})", "{{name}}"),
                    (f"max by (name) (vllmd_watch_hang_timeout_seconds{_US})", "{{name}} counts as hung"),
                ),
                unit="s",
                text="Stillness with work to do.",
            ),
            Panel(
                "Verdicts an hour",
                ((f"sum by (name, detector, result) (increase(vllmd_verdicts_total{_US}[1h])) > 0", "{{name}} {{detector}} {{result}}"),),
                text="acted: ended the instance; observed, paused: would have.",
            ),
            Panel("Proofs of life an hour", ((f"sum by (name, outcome) (increase(vllmd_canaries_total{_US}[1h])) > 0", "{{name}} {{outcome}}"),)),
            Panel(
                "Readings of the heartbeat that were not ok",
                (('max by (name, outcome) (vllmd_engine_scrape_outcome{name=~"$name",outcome!="ok"}) > 0', "{{name}} {{outcome}}"),),
            ),
            Panel(
                "Supervisor's memory",
                ((f"max by (name) (vllmd_private_memory_bytes{_US})", "{{name}}"),),
                unit="bytes",
            ),
            Panel("Dropped", ((f"sum by (name, what) (increase(vllmd_dropped_total{_US}[$__rate_interval]))", "{{name}} {{what}}"),)),
        ),
    ),
    (
        "GPUs",
        (
            Panel("Verdict", ((f"max by (gpu, class) (vllmd_gpu_verdict{_US}) == 1", "{{gpu}} {{class}}"),), kind="stat", width=16),
            Panel("Quarantined", ((_gpu("vllmd_gpu_quarantined"), "{{index}} {{gpu}}"),), kind="stat"),
            Panel("Memory in use", ((_gpu("vllmd_gpu_memory_used_bytes"), "{{index}}"), (_gpu("vllmd_gpu_memory_size_bytes"), "{{index}} has")), unit="bytes"),
            Panel("Temperature", ((_gpu("vllmd_gpu_temperature_celsius"), "{{index}}"),), unit="celsius"),
            Panel("Power", ((_gpu("vllmd_gpu_power_watts"), "{{index}}"),), unit="watt"),
            Panel("Utilization", ((_gpu("vllmd_gpu_utilization_ratio"), "{{index}}"),), unit="percentunit", max=1),
            Panel(
                "Memory errors, remapped rows",
                (
                    (f"max by (gpu, type) (vllmd_gpu_ecc_errors_total{_US})", "{{gpu}} {{type}}"),
                    (f"max by (gpu, type) (vllmd_gpu_remapped_rows_total{_US})", "{{gpu}} rows {{type}}"),
                    (f"max by (gpu) (vllmd_gpu_retired_pages_total{_US})", "{{gpu}} pages"),
                    (f"max by (gpu) (rate(vllmd_gpu_nvlink_crc_errors_total{_US}[$__rate_interval]))", "{{gpu}} NVLink checksums a second"),
                ),
            ),
            Panel("Why the clocks are low", ((f"max by (gpu, reason) (vllmd_gpu_clock_limited{_US})", "{{gpu}} {{reason}}"),)),
        ),
    ),
)


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "color": {"mode": "palette-classic"}}
    if panel.max is not None:
        defaults["max"] = panel.max
    if panel.kind == "timeseries":
        defaults["custom"] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": False}
    if panel.kind == "state-timeline":
        del defaults["min"]
        colour = {"ready": "green", "examining": "red", "killing": "red", "stopped": "dark-red", "unconfigured": "text"}
        options = {str(number): {"text": state, "color": colour.get(state, "blue"), "index": number} for number, state in enumerate(STATES)}
        defaults |= {"mappings": [{"type": "value", "options": options}], "custom": {"fillOpacity": 80, "lineWidth": 0}}
    return defaults


def _options(kind: str) -> dict[str, Any]:
    calc = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match kind:
        case "timeseries":
            return {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}, "tooltip": {"mode": "multi", "sort": "desc"}}
        case "state-timeline":
            return {"mergeValues": True, "showValue": "auto", "rowHeight": 0.8, "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False}}
        case "stat":
            return {"reduceOptions": calc, "textMode": "value_and_name", "colorMode": "value", "graphMode": "none", "orientation": "auto"}
        case _:
            return {"reduceOptions": calc, "displayMode": "basic", "orientation": "horizontal", "showUnfilled": True}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": _HEIGHT},
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel.kind),
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": expression, "legendFormat": legend, "range": True, "instant": False}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _panels() -> Iterator[dict[str, Any]]:
    number = y = 0
    for title, panels in ROWS:
        number += 1
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1}, "panels": []}
        y, x = y + 1, 0
        for panel in panels:
            if x + panel.width > _WIDTH:
                x, y = 0, y + _HEIGHT
            number += 1
            yield _panel(panel, number, x, y)
            x += panel.width
        y += _HEIGHT


def _variables() -> list[dict[str, Any]]:
    query = "label_values(vllmd_info, name)"
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0, "current": {}, "options": [], "refresh": 1},
        {
            "name": "name",
            "label": "Instance",
            "type": "query",
            "datasource": _SOURCE,
            "definition": query,
            "query": {"query": query, "refId": "names"},
            "refresh": 2,
            "sort": 1,
            "hide": 0,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "current": {"text": ["All"], "value": ["$__all"]},
            "options": [],
        },
    ]


def dashboard() -> dict[str, Any]:
    restarts = {
        "name": "Restarts",
        "enable": True,
        "iconColor": "red",
        "datasource": _SOURCE,
        "expr": f"changes(vllmd_supervisor_start_time_seconds{_US}[1m]) > 0",
        "titleFormat": "{{name}} was restarted",
        "step": "1m",
    }
    return {
        "uid": "vllmd",
        "title": "vllmd: instances, vLLM, GPUs",
        "description": "Made by `python -m tools.dashboard`.",
        "tags": ["vllmd", "vllm", "gpu"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "timezone": "",
        "annotations": {"list": [restarts]},
        "templating": {"list": _variables()},
        "links": [],
        "panels": list(_panels()),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
