"""The main job end to end: `vllmd run` in front of a vLLM, from a cold start to READY, requests, deaths and stops.

Against the fake engine as well: what fails there fails in seconds. With the real vLLM each start takes half a minute: the
tests of a class share an instance, in order, and its last test ends it.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import procs
from tests.engine.server import Kind, bound, events_of
from tests.harness import Instance

pytestmark = pytest.mark.timeout(400)
KEY = "sk-daemon-51c0ffee"
READY_S = 180.0
QUESTION: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "extra_body": {"ignore_eos": True},
}


def instance(kind: Kind, *, task: str = "generate", cgroup: bool = False, serve: dict[str, Any] | None = None) -> Instance:
    """Not started. The key comes as systemd hands it over: a credential, in nobody's environment."""
    real = kind.name == "real"
    args = {"enforce-eager": True, "dtype": "float32"} if real else {}
    config = {"serve": serve or {}, "engine": {"args": args, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}}
    made = Instance(config=config, fake={} if real else kind.env, engine=kind.executable if real else None, task=task, cgroup=cgroup)
    credentials = made.root / "credentials"
    credentials.mkdir()
    (credentials / "api-key").write_text(KEY)
    made.env["CREDENTIALS_DIRECTORY"] = str(credentials)
    return made


def client(served: Instance) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key=KEY, max_retries=0)


def nothing_left(served: Instance) -> bool:
    return not served.engine() and not bound(served.port)


@pytest.fixture(scope="class")
def generating(kind: Kind) -> Iterator[Instance]:
    with instance(kind) as served:
        served.wait_ready(READY_S)
        yield served


@pytest.fixture(scope="class")
def embedding(kind: Kind) -> Iterator[Instance]:
    with instance(kind, task="embed") as served:
        served.wait_ready(READY_S)
        yield served


class TestServing:
    def test_ready_came_after_the_phases_and_the_proof(self, generating: Instance) -> None:
        told = [text for text in generating.notify.told("STATUS") if text]
        assert any("loading-weights" in text for text in told), told
        assert told[-1] == f"Serving tiny at http://127.0.0.1:{generating.port}"
        assert "proof of life: one token" in generating.log()
        assert generating.status()["state"] == "ready"

    def test_official_client_chats_plain_and_streamed(self, generating: Instance) -> None:
        with client(generating) as api:
            plain = api.chat.completions.create(**QUESTION, max_tokens=4)
            assert plain.usage.completion_tokens == 4
            chunks = list(api.chat.completions.create(**QUESTION, max_tokens=4, stream=True))
        assert chunks[-1].choices[0].finish_reason == "length"

    def test_request_without_the_key_is_refused(self, generating: Instance) -> None:
        assert generating.ask("/v1/models", key="sk-wrong")[0] == 401

    def test_key_stands_in_no_cmdline_environ_log_or_state(self, generating: Instance) -> None:
        for process in [*generating.engine(), procs.read(generating.pid)]:
            assert process is not None
            assert KEY not in process.cmdline
            assert KEY not in str(procs.environ_of(process.pid))
        assert KEY not in generating.log()
        assert KEY not in json.dumps(generating.status())
        assert KEY not in (generating.state / "launch.json").read_text()

    def test_sigterm_lets_a_stream_in_flight_end(self, generating: Instance, kind: Kind) -> None:
        with client(generating) as api:
            chunks = iter(api.chat.completions.create(**QUESTION, max_tokens=kind.tokens, stream=True))
            next(chunks)
            generating.signal(signal.SIGTERM)
            assert list(chunks)[-1].choices[0].finish_reason == "length"
        assert generating.wait_exit(60) == 0
        assert generating.last_json()["status"] == 0
        assert generating.notify.told("STOPPING") == ["1"]
        assert nothing_left(generating)


class TestEmbedding:
    def test_official_client_gets_a_vector(self, embedding: Instance) -> None:
        assert "proof of life" in embedding.log()
        with client(embedding) as api:
            vectors = api.embeddings.create(model="tiny", input=["Hello", "World"]).data
        assert [len(vector.embedding) for vector in vectors] == [64, 64]

    def test_killed_core_ends_the_instance_with_70_and_leaves_nothing(self, embedding: Instance) -> None:
        embedding.kill_engine("VLLM::EngineCore")
        assert embedding.wait_exit(60) == 70
        assert nothing_left(embedding)
        last = embedding.last_json()
        assert last["status"] == 70
        assert last["error"]["code"]


def leave_stale_socket(path: Path) -> None:
    """What vLLM leaves, and what makes its next start fail."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def stream_over_socket(served: Instance) -> int:
    """Tokens of a streamed completion."""
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    connection = served.connection()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", "authorization": f"Bearer {KEY}"})
        with connection.getresponse() as answer:
            assert answer.status == 200
            usage = list(events_of(answer))[-1]["usage"]
    finally:
        connection.close()
    return int(usage["completion_tokens"])
