"""What the real vLLM leaves when it fails: its own words become causes, and a hang shows what every process waits for."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.engine.server import Kind
from tests.engine.test_daemon_real import KEY, QUESTION, READY_S, client, instance, nothing_left
from tests.harness import Instance, merged
from vllmd.instance.incident import EXAMINE_S

pytestmark = pytest.mark.timeout(400)


def only_real(kind: Kind) -> None:
    if kind.name != "real":
        pytest.skip("the fake engine's failures are in tests/component")


def newest(served: Instance) -> tuple[Path, dict[str, Any]]:
    folder = max((served.state / "incidents").iterdir())
    return folder, json.loads((folder / "summary.json").read_text())


def test_a_length_that_the_model_does_not_have_ends_with_78_and_the_right_number(kind: Kind) -> None:
    only_real(kind)
    with instance(kind, serve={"max_model_len": 999_999}) as served:
        assert served.wait_exit(READY_S) == 78, served.describe()
        error = served.last_json()["error"]
        assert error["code"] == "bad_flag"
        assert "999999" in error["what"]
        assert "serve.max_model_len to 2048 or less" in error["hint"]
        folder, summary = newest(served)
        assert summary["fingerprint"].startswith("ValidationError:")
        assert "create_model_config" in (folder / "cause.txt").read_text()


def test_a_hang_under_load_shows_every_process_and_the_last_metrics(kind: Kind) -> None:
    only_real(kind)
    served = instance(kind, cgroup=True)
    served.config = merged(served.config, {"watch": {"hang_timeout_s": 5, "first_request_timeout_s": 5, "heartbeat_interval_s": 0.5}})
    served.write_config()
    with served:
        served.wait_ready(READY_S)
        core = served.engine_process("VLLM::EngineCore").pid  # to look for it takes a part of the second that the stream lasts
        with client(served) as api:
            stream = iter(api.chat.completions.create(**QUESTION, max_tokens=2000, stream=True))
            next(stream)
            os.kill(core, signal.SIGSTOP)
            assert served.wait_exit(60) == 75, served.describe()
        assert served.last_json()["error"]["code"] == "engine_hung"
        folder, summary = newest(served)
        assert summary["took_s"] < EXAMINE_S
        waits = (folder / "waits.txt").read_text()
        assert f"=== {core} VLLM::EngineCor" in waits
        assert waits.count("=== ") >= 4
        assert "vllm:iteration_tokens_total_count" in (folder / "metrics.txt").read_text()
        assert all(KEY not in path.read_text() for path in folder.iterdir())
        assert nothing_left(served)
