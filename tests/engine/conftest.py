"""The two engines: the fake, and the real vLLM where it is installed."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.server import ENDLESS, REAL_ENV, Kind
from tests.needs import need
from vllmd.models import demo

FAKE = Path(__file__).resolve().parents[1] / "fakes" / "engine.py"


def engines_directory() -> Path:
    """Where `vllmctl engine install` of the set-up put it; outside the tree, so that it is downloaded once."""
    return Path(os.environ.get("VLLMD_TEST_ENGINES") or Path.home() / ".cache/vllmd-dev/engines")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one tiny model of each kind: generate/, embed/, score/."""
    folder = tmp_path_factory.mktemp("models")
    for kind in demo.KINDS:
        demo.make(folder / kind, kind)
    _lengthen(folder / "generate/config.json")
    return folder


def _lengthen(config: Path) -> None:
    """Room for a stream that outlasts whatever a test does to the engine, on a machine of any speed."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2 * ENDLESS}))


@pytest.fixture(scope="module")
def real_engine() -> Iterator[Path]:
    """The vllm executable. Only one test run at a time uses it: a second would make both miss their deadlines."""
    executable = engines_directory() / "current/bin/vllm"
    need(executable.is_file(), f"a real vLLM at {executable} (vllmctl engine install, or make setup)")
    with (Path(tempfile.gettempdir()) / f"vllmd-test-real-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield executable


@pytest.fixture(
    scope="module",
    params=[pytest.param("fake", marks=pytest.mark.component), pytest.param("real", marks=pytest.mark.engine)],
)
def kind(request: pytest.FixtureRequest, tiny_models: Path) -> Kind:
    if request.param == "fake":
        return Kind("fake", FAKE, tiny_models, 10, 1500, env={"FAKE_TOKEN_S": "0.001", "FAKE_START_S": "0.6"})
    executable = request.getfixturevalue("real_engine")
    return Kind("real", executable, tiny_models, 180, 1500, ("--enforce-eager", "--dtype", "float32"), REAL_ENV)
