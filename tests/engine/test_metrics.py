"""The real vLLM tells what alerts and dashboard ask for, under the names and labels of the exposition that was recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.record_metrics import recorded
from tests.engine.server import REAL_ENV, EngineServer, Kind
from tests.unit.expositions import VLLM, names
from tests.unit.test_monitoring import asked

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def live(real_engine: Path, tiny_models: Path) -> Iterator[dict[str, set[str]]]:
    kind = Kind("real", real_engine, tiny_models, 240, 0, ("--enforce-eager", "--dtype", "float32"), REAL_ENV)
    with contextlib.closing(EngineServer(kind)) as server:
        server.wait_ready()
        yield names(recorded(server))


def test_what_is_asked_for_is_told(live: dict[str, set[str]]) -> None:
    wanted = {name for name in asked() if name.startswith(("vllm:", "http_"))}
    assert len(wanted) > 10
    assert wanted <= set(live), "python -m tests.engine.record_metrics, and change tools/dashboard.py and share/prometheus/alerts.yaml"


def test_labels_are_those_that_were_recorded(live: dict[str, set[str]]) -> None:
    known = names(VLLM.read_text())
    assert {name: live[name] for name in asked() if name in known} == {name: known[name] for name in asked() if name in known}
