"""What vllmd relies on of vLLM, proved against the fake engine *and* the real one, so that the fake cannot drift.

A start of the real one takes half a minute: the tests of a class share one, in order, and its last test ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import procs
from tests.engine.server import ENDLESS, KEY, NAME, EngineServer, Kind, bound, listens

pytestmark = pytest.mark.timeout(300)
PROMPT = {"model": NAME, "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
Watched = list[tuple[bool, bool, int | str]]


@contextlib.contextmanager
def running(kind: Kind, *flags: str, model: str = "generate", uds: str = "") -> Iterator[EngineServer]:
    with contextlib.closing(EngineServer(kind, *flags, model=model, uds=uds)) as server:
        server.wait_ready()
        yield server


def client(server: EngineServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="class")
def watched() -> Watched:
    """(bound, listens, answer of /health) as it changed during the start."""
    return []

@pytest.fixture(scope="class")
def generating(kind: Kind, watched: Watched) -> Iterator[EngineServer]:
    with contextlib.closing(EngineServer(kind, "--shutdown-timeout", "30")) as server:
        deadline = time.monotonic() + kind.start_s
        while not watched or watched[-1][2] != 200:
            assert server.process.poll() is None, server.output()
            assert time.monotonic() < deadline, server.output()
            health, now = server.health(), (bound(server.port), listens(server.port))
            if not watched or watched[-1] != (*now, health):
                watched.append((*now, health))
            time.sleep(0.01)
        server.note_litter()
        yield server


@pytest.fixture(scope="class")
def embedding(kind: Kind) -> Iterator[EngineServer]:
    with running(kind, model="embed") as server:
        yield server


@contextlib.contextmanager
def stalled_stream(server: EngineServer) -> Iterator[Iterator[dict[str, Any]]]:
    """A stream whose EngineCore is stopped in its midst; continued at the end."""
    with server.stream(ENDLESS) as events:
        next(events)
        server.signal(signal.SIGSTOP, "VLLM::EngineCore")
        try:
            procs.wait_until("counters that stand still", lambda: is_steady(server))
            yield events
        finally:
            server.signal(signal.SIGCONT, "VLLM::EngineCore")


def is_steady(server: EngineServer) -> bool:
    before = server.metric("vllm:iteration_tokens_total_count")
    time.sleep(0.3)
    return server.metric("vllm:iteration_tokens_total_count") == before


class TestGenerating:
    def test_port_is_bound_early_and_listened_on_at_the_end(self, generating: EngineServer, watched: Watched) -> None:
        assert (True, False, "ConnectionRefusedError") in watched, "bound without listening"
        assert {health for _, _, health in watched} == {"ConnectionRefusedError", 200}, "no 503 phase"

    def test_start_says_its_phases_in_order(self, generating: EngineServer) -> None:
        out = (generating.folder / "out").read_text()
        marks = ["version 0.", "non-default args", "EngineCore pid=", "Starting to load model", "Loading weights took",
                 "KV cache size", "init engine", "Supported tasks", "Starting vLLM server on"]  # fmt: skip
        places = [out.find(mark) for mark in marks]
        assert -1 not in places, f"missing: {marks[places.index(-1)]}"
        assert places == sorted(places)
        err = (generating.folder / "err").read_bytes()
        assert b"\rLoading safetensors checkpoint shards:   0% Completed" in err
        assert b"Application startup complete." in err

    def test_model_is_known_under_its_served_name(self, generating: EngineServer) -> None:
        status, models = generating.ask("/v1/models")
        assert (status, [model["id"] for model in models["data"]]) == (200, [NAME])
        assert generating.ask("/v1/completions", {**PROMPT, "model": "other"})[0] == 404

    def test_completion_has_the_tokens_that_were_asked_for(self, generating: EngineServer) -> None:
        status, answer = generating.ask("/v1/completions", PROMPT)
        assert (status, answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (200, 3, "length")
        assert generating.ask("/v1/completions", {**PROMPT, "max_tokens": 99999})[0] == 400

    def test_official_client_chats_plain_and_streamed(self, generating: EngineServer) -> None:
        question: dict[str, Any] = {
            "model": NAME,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 4,
            "extra_body": {"ignore_eos": True},
        }
        with client(generating) as api:
            plain = api.chat.completions.create(**question)
            assert plain.usage.completion_tokens == 4
            chunks = list(api.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage.completion_tokens == 4

    def test_key_guards_v1_and_nothing_else(self, generating: EngineServer) -> None:
        assert generating.ask("/v1/models", key="")[0] == 401
        assert generating.ask("/v1/completions", PROMPT, key="sk-wrong")[0] == 401
        open_ones = [generating.ask(path, key="")[0] for path in ("/health", "/metrics", "/version", "/load")]
        assert open_ones == [200] * 4
        assert generating.ask("/tokenize", {"model": NAME, "prompt": "hi"}, key="")[0] == 200
        assert generating.ask("/invocations", {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}, key="")[0] == 200

    def test_key_from_the_config_file_stands_in_no_cmdline_environ_or_output(self, generating: EngineServer) -> None:
        for process in generating.members():
            assert KEY not in process.cmdline
            assert KEY not in str(procs.environ_of(process.pid))
        assert KEY not in generating.output()

    def test_a_route_of_another_task_is_not_found(self, generating: EngineServer) -> None:
        assert generating.ask("/v1/embeddings", {"model": NAME, "input": "hi"})[0] == 404

    def test_counters_move_with_every_step(self, generating: EngineServer) -> None:
        names = ("vllm:iteration_tokens_total_count", "vllm:generation_tokens_total", "vllm:prompt_tokens_total")
        before = [generating.metric(name) for name in names]
        generating.ask("/v1/completions", PROMPT)
        steps, generated, prompted = (generating.metric(name) - old for name, old in zip(names, before, strict=True))
        assert steps >= 3
        assert generated == 3
        assert prompted > 0
        assert generating.metric("vllm:num_requests_running") == generating.metric("vllm:num_requests_waiting") == 0

    def test_a_long_prompt_moves_the_cache_and_no_counter(self, generating: EngineServer, kind: Kind) -> None:
        """In chunks, of which all but the last yield no token: vLLM counts no iteration then, and a supervisor that looked at
        those alone would take a long prefill for a hang."""
        prompt = [5] * (25_000 if kind.name == "real" else 1_000_000)
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(generating.ask("/v1/completions", {**PROMPT, "prompt": prompt}, timeout_s=120)[0]))
        steps = generating.metric("vllm:iteration_tokens_total_count")
        seen: set[float] = set()
        asking.start()
        while len(seen) < 3 and asking.is_alive():
            cached = generating.metric("vllm:kv_cache_usage_perc")
            if generating.metric("vllm:iteration_tokens_total_count") == steps:
                seen.add(cached)
        asking.join()
        assert answers == [200]
        assert len(seen) >= 3, "the share of the KV cache in use grows with each chunk"

    def test_tree_is_one_session_with_renamed_children(self, generating: EngineServer) -> None:
        members = generating.members()
        assert {process.pgid for process in members} == {generating.pid}
        core, worker = generating.member("VLLM::EngineCore"), generating.member("VLLM::Worker")
        assert (core.cmdline, worker.cmdline) == ("VLLM::EngineCore", "VLLM::Worker")
        assert (core.ppid, worker.ppid) == (generating.pid, core.pid)
        assert any("resource_tracker" in process.cmdline for process in members)

    def test_port_in_use_ends_a_second_start_with_1(self, generating: EngineServer, kind: Kind) -> None:
        with contextlib.closing(EngineServer(kind, port=generating.port)) as second:
            assert second.wait_exit(kind.start_s) == 1
            assert "Address already in use" in second.output()

    def test_stopped_core_stalls_requests_but_not_health(self, generating: EngineServer, kind: Kind) -> None:
        with stalled_stream(generating) as events:
            steps = generating.metric("vllm:iteration_tokens_total_count")
            with pytest.raises(TimeoutError):
                generating.ask("/v1/completions", PROMPT, timeout_s=1)
            assert generating.health() == 200
            assert generating.metric("vllm:num_requests_running") == 1
            assert generating.metric("vllm:iteration_tokens_total_count") == steps
            assert generating.metric("vllm:num_requests_waiting") == 0, "a new request does not even appear as waiting"
            generating.signal(signal.SIGCONT, "VLLM::EngineCore")
            assert next(events)["choices"], "it goes on"
        procs.wait_until("the cut stream's end", lambda: generating.metric("vllm:num_requests_running") == 0, 30)

    def test_sigterm_lets_a_stream_end_and_refuses_new_requests(self, generating: EngineServer, kind: Kind) -> None:
        with generating.stream(kind.tokens) as events:
            next(events)
            generating.signal(signal.SIGTERM)
            time.sleep(0.3)
            assert generating.health() == 200
            assert generating.ask("/v1/completions", PROMPT)[0] == 500
            assert list(events)[-1]["choices"][0]["finish_reason"] == "length"
        assert generating.wait_exit(30) == 0
        generating.wait_empty()


class TestEmbedding:
    def test_official_client_gets_a_vector(self, embedding: EngineServer) -> None:
        with client(embedding) as api:
            vectors = api.embeddings.create(model=NAME, input=["Hello", "World"]).data
        assert [len(vector.embedding) for vector in vectors] == [64, 64]

    def test_completions_are_not_found(self, embedding: EngineServer) -> None:
        assert embedding.ask("/v1/completions", PROMPT)[0] == 404
        assert embedding.ask("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "hi"}]})[0] == 404

    def test_idle_sigterm_ends_it_with_0(self, embedding: EngineServer) -> None:
        asked = embedding.signal(signal.SIGTERM)
        assert embedding.wait_exit(10) == 0
        assert time.monotonic() - asked < 8
        embedding.wait_empty()


def test_killed_core_gives_503_an_exit_with_0_and_a_socket_that_ends_the_next_start(kind: Kind) -> None:
    with tempfile.TemporaryDirectory(prefix="vs-") as folder:
        path = f"{folder}/s"
        with running(kind, uds=path) as server:
            with server.stream(ENDLESS) as events:
                next(events)
                killed = server.signal(signal.SIGKILL, "VLLM::EngineCore")
                procs.wait_until("503", lambda: server.health() == 503, 1)
                assert "choices" not in list(events)[-1], "an event that is an error ends the stream"
            assert server.wait_exit(15) == 0
            assert time.monotonic() - killed < 12
            server.wait_empty()
        assert Path(path).is_socket()
        with contextlib.closing(EngineServer(kind, uds=path)) as second:
            assert second.wait_exit(kind.start_s) == 1


def test_killed_api_server_orphans_its_children_and_frees_the_port(kind: Kind) -> None:
    with running(kind) as server:
        core, worker = server.member("VLLM::EngineCore").pid, server.member("VLLM::Worker").pid
        server.signal(signal.SIGKILL)
        server.wait_exit(5)
        procs.wait_until("a free port", lambda: not bound(server.port), 5)
        time.sleep(2)  # the fact is that they live on: nothing to wait for
        assert procs.is_alive(core)
        assert procs.is_alive(worker)
    assert not procs.is_alive(core)


def test_wrong_starts_end_with_documented_codes(kind: Kind, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        bad_flag = stack.enter_context(contextlib.closing(EngineServer(kind, "--no-such-flag", "1")))
        missing = stack.enter_context(contextlib.closing(EngineServer(kind, model=str(tmp_path / "missing"))))
        assert bad_flag.wait_exit(kind.start_s) == 2
        assert "unrecognized arguments: --no-such-flag" in bad_flag.output()
        assert missing.wait_exit(kind.start_s) == 1
    assert os.listdir(tmp_path) == []  # noqa: PTH208
