"""Records what the real vLLM tells at /metrics: `python -m tests.engine.record_metrics` writes tests/unit/data/vllm-VERSION-metrics.txt.

For a new version of vLLM; tests/engine/test_metrics.py says when the recorded one is not true any more.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

from tests.engine.conftest import engines_directory
from tests.engine.server import NAME, REAL_ENV, EngineServer, Kind
from vllmd.models import demo

DATA = Path(__file__).parents[1] / "unit/data"


def recorded(server: EngineServer) -> str:
    """After one completion, since some series begin with the first."""
    body = {"model": NAME, "prompt": "hi", "max_tokens": 20, "ignore_eos": True}
    status, answer = server.ask("/v1/completions", body)
    assert status == 200, answer
    return str(server.ask("/metrics", key="")[1])


def main() -> None:
    executable = engines_directory() / "current/bin/vllm"
    with tempfile.TemporaryDirectory() as folder:
        demo.make(Path(folder) / "generate", "generate")
        kind = Kind("real", executable, Path(folder), 240, 0, ("--enforce-eager", "--dtype", "float32"), REAL_ENV)
        with contextlib.closing(EngineServer(kind)) as server:
            server.wait_ready()
            text = recorded(server)
    version = json.loads((executable.parents[1] / "vllmd-engine.json").read_text())["version"]
    path = DATA / f"vllm-{version}-metrics.txt"
    path.write_text(text)
    print(path)


if __name__ == "__main__":
    main()
