"""The three commands as people chain them today, configured by the environment alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.ports import free_port
from vllmd.models import demo

pytestmark = pytest.mark.component

ROOT = Path(__file__).parent.parent.parent
COMMANDS = Path(sys.executable).parent
CHAIN = "vllm-preflight && vllm-resolve-model && exec vllm-serve"


def environment(tmp_path: Path, port: int) -> dict[str, str]:
    models, cache, tools = tmp_path / "models", tmp_path / "cache", tmp_path / "tools"
    for directory in (models, cache, tools):
        directory.mkdir()
    (tools / "vllm").symlink_to(ROOT / "tests/fakes/engine.py")
    (tmp_path / "config.yaml").write_text("dtype: float32\n")
    demo.make(models / "tiny")
    return {
        "PATH": f"{tools}:{COMMANDS}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "VLLM_PREFLIGHT_LOCKFILE": str(tmp_path / "port.lock"),
        "FLOX_ENV_CACHE": str(cache),
        "VLLM_CONFIG_FILE": str(tmp_path / "config.yaml"),
        "VLLM_MODELS_DIR": str(models),
        "VLLM_MODEL": "tiny",
        "VLLM_MODEL_ORG": "me",
        "VLLM_PORT": str(port),
        "VLLM_TENSOR_PARALLEL_SIZE": "1",
        "VLLM_PIPELINE_PARALLEL_SIZE": "1",
        "VLLM_MAX_MODEL_LEN": "128",
        "VLLM_MAX_NUM_BATCHED_TOKENS": "128",
        "VLLM_KV_CACHE_DTYPE": "auto",
        "VLLM_SERVED_MODEL_NAME": "tiny",
    }


@contextmanager
def running(command: str, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sh", "-c", command], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield child
    finally:
        if child.poll() is None or child.returncode != 0:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_the_chain_serves_the_model_that_it_resolved(tmp_path: Path) -> None:
    port = free_port()
    with running(CHAIN, environment(tmp_path, port)) as child:
        deadline = time.monotonic() + 60
        while not healthy(port):
            assert child.poll() is None, child.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        output = child.communicate(timeout=30)[0].decode()
    assert "[model] Resolved: me/tiny (via local)" in output


def test_a_stage_that_fails_ends_the_chain_with_its_own_status(tmp_path: Path) -> None:
    environ = environment(tmp_path, free_port())
    environ["VLLM_MODEL"] = "absent"
    result = subprocess.run(["sh", "-c", CHAIN], env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert "CMD:" not in result.stderr


def test_serve_without_a_resolved_model_says_what_to_run(tmp_path: Path) -> None:
    environ = environment(tmp_path, free_port())
    result = subprocess.run([COMMANDS / "vllm-serve"], env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert "vllm-resolve-model" in result.stderr
