"""What is shipped for Prometheus and Grafana: valid by promtool, and asking for nothing that vllmd or vLLM does not tell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import promtool
from tests.unit.alert_cases import CASES, Case, Series
from tests.unit.expositions import VLLM, names, ours
from tools import dashboard
from vllmd.core.gpu_conditions import CLOCK_REASONS

pytestmark = pytest.mark.unit

SHARE = Path(__file__).resolve().parents[2] / "share"
ALERTS = SHARE / "prometheus/alerts.yaml"
RULES: list[dict[str, Any]] = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
DASHBOARD: dict[str, Any] = json.loads(dashboard.PATH.read_text())
FROM_PROMETHEUS = {"up": {"job", "instance", "name"}, "node_textfile_mtime_seconds": {"file"}}
GPU_WATCH = {"vllmd_gpu_watch_quarantined": {"gpu", "class"}}
"""As tests/component/test_gpu_host.py sees it told."""
TARGET_LABELS = {"name", "instance", "job"}
_NAME = re.compile(r'(?<![\w:".$])((?:vllmd_|vllm:|http_|node_|up\b)[\w:]*)(?:\{([^}]*)\})?')
_MATCHER = re.compile(r"([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)")


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of every alert and panel."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']}, {target['refId']}", target["expr"]
    for note in DASHBOARD["annotations"]["list"]:
        yield note["name"], note["expr"]


def asked() -> set[str]:
    """Every metric that an alert or a panel asks for."""
    return {name for _, expression in expressions() for name, _ in _NAME.findall(expression)}


def test_promtool_finds_the_alerts_valid() -> None:
    checked = promtool.run("check", "rules", str(ALERTS))
    assert checked.returncode == 0, checked.stdout
    assert f"{len(RULES)} rules found" in checked.stdout


def test_promtool_finds_the_scrape_configuration_valid(tmp_path: Path) -> None:
    """As a whole prometheus.yml, with the shipped example as its targets."""
    (tmp_path / "vllmd-a.yaml").write_text((SHARE / "prometheus/targets.yaml.example").read_text())
    (tmp_path / "vllm-a.yaml").write_text((SHARE / "prometheus/targets.yaml.example").read_text())
    text = (SHARE / "prometheus/scrape.yaml").read_text().replace("/etc/prometheus/vllmd", str(tmp_path))
    (tmp_path / "alerts.yaml").write_text(ALERTS.read_text())
    (tmp_path / "prometheus.yml").write_text(text + "rule_files: [alerts.yaml]\n")
    checked = promtool.run("check", "config", str(tmp_path / "prometheus.yml"))
    assert checked.returncode == 0, checked.stdout
    assert "WARNING" not in checked.stdout, checked.stdout


def test_every_metric_and_label_that_is_asked_for_is_told_by_somebody(tmp_path: Path) -> None:
    told = {**names(ours(tmp_path)), **names(VLLM.read_text()), **FROM_PROMETHEUS, **GPU_WATCH}
    for where, expression in expressions():
        found = _NAME.findall(expression)
        assert found, where
        for name, matchers in found:
            assert name in told, f"{where}: nobody tells {name}"
            unknown = set(_MATCHER.findall(matchers)) - told[name] - TARGET_LABELS
            assert not unknown, f"{where}: {name} has no {unknown}"


def test_every_label_that_is_grouped_by_or_shown_is_told(tmp_path: Path) -> None:
    told = {**names(ours(tmp_path)), **names(VLLM.read_text()), **FROM_PROMETHEUS, **GPU_WATCH}
    for where, expression in expressions():
        labels = set().union(*(told[name] for name, _ in _NAME.findall(expression))) | TARGET_LABELS
        grouped = {label.strip() for listed in re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", expression) for label in listed.split(",")}
        assert grouped <= labels, where
    for rule in RULES:
        labels = set().union(*(told[name] for name, _ in _NAME.findall(rule["expr"]))) | TARGET_LABELS
        shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert shown <= labels, rule["alert"]


def test_values_of_labels_that_are_asked_for_are_told(tmp_path: Path) -> None:
    """A detector, outcome or state that was renamed would leave an alert that never fires."""
    told = ours(tmp_path)
    for where, expression in expressions():
        for name, matchers in _NAME.findall(expression):
            for label, value in re.findall(r'(?<!\w)(state|outcome|result|detector|class|what|reason)=~?"([^"$]*)"', matchers):
                lines = [line for line in told.splitlines() if line.startswith(f"{name}{{")]
                known = set(CLOCK_REASONS.values()) if label == "reason" else set(re.findall(rf'{label}="([^"]*)"', "\n".join(lines)))
                assert set(value.split("|")) <= known, f"{where}: {label}={value} among {known}"


def test_promtool_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": filled_in(expression)} for number, (_, expression) in enumerate(expressions())]
    (tmp_path / "queries.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool.run("check", "rules", str(tmp_path / "queries.yaml"))
    assert checked.returncode == 0, checked.stdout
    assert f"{len(rules)} rules found" in checked.stdout


def filled_in(expression: str) -> str:
    """As Grafana asks it."""
    text = expression.replace("$__rate_interval", "1m").replace("$name", "demo|qwen")
    assert "$" not in text, expression
    return text


# Alerts


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_which_command_to_run(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    runbook = rule["annotations"]["runbook"]
    assert re.search(r"`[^`]+`", runbook) or "Report it" in runbook
    assert all(text.endswith(".") for text in (rule["annotations"]["description"], runbook))


def test_every_alert_is_tried() -> None:
    assert {case.alert for case in CASES} == {rule["alert"] for rule in RULES}


def evaluation(case: Case, series: Series, count: int) -> dict[str, Any]:
    samples = [{"labels": "{}", "value": count}] if count else []
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": f'count(ALERTS{{alertname="{case.alert}",alertstate="firing"}})', "eval_time": f"{case.at}m", "exp_samples": samples}],
    }


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    tests = [evaluation(case, *each) for case in CASES for each in ((case.raises, case.count), (case.spares, 0))]
    path = tmp_path / "tests.yaml"
    path.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}))
    checked = promtool.run("test", "rules", str(path))
    assert checked.returncode == 0, checked.stdout


# The dashboard


def test_the_dashboard_is_what_its_rows_draw() -> None:
    assert dashboard.PATH.read_text() == dashboard.text(), "run: python -m tools.dashboard"


def test_panels_have_ids_of_their_own_and_cover_no_other() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        covers = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not covers & cells, panel["title"]
        cells |= covers


def test_the_dashboard_asks_the_chosen_prometheus_for_the_chosen_instances() -> None:
    assert {each["name"] for each in DASHBOARD["templating"]["list"]} == {"datasource", "name"}
    for panel in DASHBOARD["panels"]:
        if panel["type"] == "row":
            continue
        assert [target["refId"] for target in panel["targets"]] == [chr(65 + index) for index in range(len(panel["targets"]))]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert '=~"$name"' in target["expr"], panel["title"]


def test_what_the_issue_asks_for_is_drawn(tmp_path: Path) -> None:
    ours_shown = asked() & set(names(ours(tmp_path)))
    assert {"vllmd_state", "vllmd_engine_heartbeat_age_seconds", "vllmd_verdicts_total", "vllmd_failures_total", "vllmd_gpu_verdict"} <= ours_shown
    assert {"vllm:generation_tokens_total", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:inter_token_latency_seconds_bucket"} <= asked()


def test_the_provisioning_names_the_directory_of_the_dashboard() -> None:
    text = (SHARE / "grafana/provisioning/vllmd.yaml").read_text().replace("@DATADIR@", "/usr/local/share/vllmd")
    provider = yaml.safe_load(text)["providers"][0]
    assert provider["options"]["path"] == f"/usr/local/share/vllmd/{dashboard.PATH.parent.relative_to(SHARE)}"
    assert yaml.safe_load(text)["apiVersion"] == 1
    assert yaml.safe_load((SHARE / "grafana/provisioning/datasource.yaml.example").read_text())["datasources"][0]["type"] == "prometheus"
