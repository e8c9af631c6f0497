"""A model that is nowhere on this host: fetched from S3 and from a hub, published, served by a vLLM, asked for a completion.
Between the two the API server is killed, and what it leaves must not stop the next start."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import procs
from tests.engine.server import Kind
from tests.engine.test_daemon_real import KEY, READY_S, instance, leave_stale_socket, nothing_left, stream_over_socket
from tests.fakes.hub import FakeHub
from tests.harness import Instance, merged
from vllmd.models import demo

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """The endpoint of an S3 that has the model under models/prod/Tiny/."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client: Any = boto3.client("s3", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1")
    try:
        client.create_bucket(Bucket="models")
        for path in demo.make(tmp_path / "uploaded").iterdir():
            client.upload_file(str(path), "models", f"prod/Tiny/{path.name}")
        yield url
    finally:
        client.close()
        server.stop()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub({"acme/Tiny": demo.make(tmp_path / "pushed", seed=8)}) as hub:
        yield hub


def test_served_from_s3_then_killed_then_served_from_a_hub_over_stale_sockets(kind: Kind, bucket: str, hub: FakeHub) -> None:
    """One test, since each start of the real engine takes half a minute: both sources, and the death of the API server."""
    with contextlib.closing(instance(kind, cgroup=True, serve={"listen": "uds"})) as served:
        path = served.root / "run/sock/demo.sock"
        leave_stale_socket(path)
        served.env |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        first = _served(served, {"path": "", "id": "acme/Tiny", "sources": ["r2"], "r2_bucket": "models", "r2_models_prefix": "prod", "r2_endpoint_url": bucket})
        assert _completed_tokens(served) > 0
        _kill_the_api_server(served)
        leave_stale_socket(path)
        second = _served(served, {"sources": ["hf-hub"], "hf_endpoint": hub.url})
        assert stream_over_socket(served) == 4
        assert first != second
        assert Path(first).is_dir(), "the version before is kept"
        served.signal(signal.SIGTERM)
        assert served.wait_exit(60) == 0
        assert nothing_left(served)


def _served(served: Instance, model: dict[str, Any]) -> str:
    """Starts it with that model; the directory that is served."""
    served.config = merged(served.config, {"model": model})
    served.write_config()
    served.start().wait_ready(READY_S)
    directory = str(served.status()["model"]["directory"])
    assert "/.published/acme-Tiny." in directory
    assert directory in served.engine_process("main").cmdline
    return directory


def _completed_tokens(served: Instance) -> int:
    status, body = served.ask("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 3}, key=KEY)
    assert status == 200, body
    return int(json.loads(body)["usage"]["completion_tokens"])


def _kill_the_api_server(served: Instance) -> None:
    """Nothing is left, although its children are orphans then."""
    orphans = [served.engine_process(name).pid for name in ("VLLM::EngineCore", "VLLM::Worker")]
    served.kill_engine("main")
    assert served.wait_exit(30) == 70
    assert not served.engine()
    assert not any(map(procs.is_alive, orphans))
