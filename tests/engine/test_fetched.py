"""A model that is nowhere on this host: fetched from S3 and from a hub, published, served by a vLLM, asked for a completion."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.server import Kind
from tests.engine.test_daemon_real import KEY, READY_S, instance
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


def test_served_from_s3_and_after_that_from_a_hub(kind: Kind, bucket: str, hub: FakeHub) -> None:
    with contextlib.closing(instance(kind)) as served:
        s3 = {"path": "", "id": "acme/Tiny", "sources": ["r2"], "r2_bucket": "models", "r2_models_prefix": "prod", "r2_endpoint_url": bucket}
        served.env |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        first = _answered(served, s3)
        second = _answered(served, {"sources": ["hf-hub"], "hf_endpoint": hub.url})
        assert first != second
        assert Path(first).is_dir(), "the version before is kept"


def _answered(served: Instance, model: dict[str, Any]) -> str:
    """Starts it with that model and has one completion; the directory that was served."""
    served.config = merged(served.config, {"model": model})
    served.write_config()
    if served.daemon is not None:
        served.signal(signal.SIGTERM)
        assert served.wait_exit() == 0
    served.start().wait_ready(READY_S)
    status, body = served.ask("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 3}, key=KEY)
    assert status == 200, body
    assert json.loads(body)["usage"]["completion_tokens"] > 0
    directory = str(served.status()["model"]["directory"])
    assert "/.published/acme-Tiny." in directory
    assert directory in served.engine_process("main").cmdline
    return directory
