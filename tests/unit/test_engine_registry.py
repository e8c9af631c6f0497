"""Engines are found by name, wherever they come from, and only the one that is asked for is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.fakes.mini_engine import Mini
from tests.unit.engine_contexts import context
from vllmd.engines import registry
from vllmd.engines.protocol import Engine
from vllmd.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    registry._made.cache_clear()
    yield
    registry._made.cache_clear()


def test_vllm_is_built_in() -> None:
    assert registry.get("vllm").name == "vllm"


def test_a_name_that_is_nearly_one_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="no engine 'vlm'") as caught:
        registry.get("vlm")
    assert caught.value.hint == "did you mean vllm?"


@pytest.mark.usefixtures("fresh")
def test_a_registered_engine_is_an_engine_like_any_other(tmp_path: Path) -> None:
    registry.register("mini", Mini)
    engine: Engine = registry.get("mini")
    assert engine.health_path == "/alive"
    assert engine.endpoints(context(tmp_path))[0].port == 8000


@pytest.mark.usefixtures("fresh")
def test_an_engine_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("mini", "tests.fakes.mini_engine:Mini", registry.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [point] if group == registry.GROUP else [])
    assert isinstance(registry.get("mini"), Mini)
    assert registry.names() == ["mini", "vllm"]


@pytest.mark.usefixtures("fresh")
def test_a_plug_in_that_does_not_load_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("broken", "no.such.module:Engine", registry.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [point])
    with pytest.raises(ConfigError, match="does not load: No module named 'no'"):
        registry.get("broken")


def test_looking_for_an_engine_imports_no_vllm_code() -> None:
    code = "import sys, vllmd.engines.registry; print(sorted(m for m in sys.modules if m.startswith('vllmd.engines.vllm')))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout.strip() == "[]"
