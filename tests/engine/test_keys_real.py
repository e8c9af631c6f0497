"""Keys in front of a vLLM: every route that it has wants one, clients get through with it, and it changes under a stream.

Against the fake engine as well, which has fewer routes and the same guard.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import procs
from tests.engine.server import REAL_ENV, Kind
from tests.harness import Instance

pytestmark = pytest.mark.timeout(500)
READY_S = 240.0
OPEN = {"/health", "/metrics"}
DEV: Mapping[str, str] = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""All the routes that there can be: sleep, collective_rpc, loading of LoRA, ..."""
QUESTION: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "extra_body": {"ignore_eos": True}}

LIST_ROUTES = """
import json, sys
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-tokenizer-info-endpoint"])
def walk(routes, above=""):
    for route in routes:
        path = above + getattr(route, "path", "")
        if getattr(route, "routes", None):
            yield from walk(route.routes, path)
        kind = "websocket" if "WebSocket" in type(route).__name__ else "http"
        yield [kind, path or "/", sorted(getattr(route, "methods", None) or ["GET"])]
tasks = ("generate", "embed", "classify", "score", "token_embed", "token_classify", "plugin", "transcription", "realtime", "render", "translation")
json.dump(list(walk(build_app(args, tasks).routes)), sys.stdout)
"""
"""Those of every task, those that no schema shows, and what is mounted."""

FAKE_ROUTES = [
    ("http", path, [method])
    for method, paths in {
        "GET": ("/health", "/ping", "/metrics", "/version", "/load", "/v1/models"),
        "POST": ("/tokenize", "/detokenize", "/v1/completions", "/v1/chat/completions", "/invocations"),
    }.items()
    for path in paths
]


def vllmctl(served: Instance, *words: str) -> str:
    argv = [str(Path(sys.executable).parent / "vllmctl"), "--root", str(served.root), "api-key", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def served(kind: Kind) -> Iterator[Instance]:
    real = kind.name == "real"
    args = {"enforce-eager": True, "dtype": "float32", "enable-tokenizer-info-endpoint": True} if real else {}
    config = {"engine": {"args": args, "env": {"VLLM_CPU_KVCACHE_SPACE": "1", **DEV}}}
    with Instance(config=config, fake={} if real else kind.env, engine=kind.executable if real else None) as made:
        made.wait_ready(READY_S)
        yield made
        made.signal(signal.SIGTERM)
        assert made.wait_exit(90) == 0, made.describe()


@pytest.fixture(scope="module")
def routes(kind: Kind, served: Instance) -> list[tuple[str, str, list[str]]]:
    if kind.name == "fake":
        return FAKE_ROUTES
    env = {"PATH": "/usr/bin:/bin", "HOME": str(served.root), **REAL_ENV, **DEV}
    python = str(kind.executable.parent / "python")
    done = subprocess.run([python, "-c", LIST_ROUTES], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(each) for each in json.loads(done.stdout.splitlines()[-1])]


def path_of(route: str) -> str:
    """With something in the place of each parameter."""
    return "/".join("x" if part.startswith("{") else part for part in route.split("/"))


def status(served: Instance, method: str, path: str, key: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    with contextlib.closing(served.connection(key=key)) as link:
        link.request(method, path, b"{}" if method in ("POST", "PUT", "PATCH") else None, {"Content-Type": "application/json", **(headers or {})})
        answer = link.getresponse()
        return answer.status, answer.read()


def handshake(served: Instance, path: str, key: str) -> int:
    """The status of the answer to a websocket's first request: 101 where it is let in."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *([f"Authorization: Bearer {key}"] if key else []),
    ]
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as link:
        link.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        return int(link.recv(100).split()[1])


def test_every_route_wants_the_key(served: Instance, routes: list[tuple[str, str, list[str]]], kind: Kind) -> None:
    let_in, asked, real = [], 0, kind.name == "real"
    for form, route, methods in routes:
        path = path_of(route)
        for key in ("", "sk-wrong"):
            for method in {*methods, "GET", "POST", *(("OPTIONS", "HEAD", "PUT", "PROPFIND") if real else ())} if form == "http" else ():
                asked += 1
                found = status(served, method, path, key)[0]
                if found != 401 and path not in OPEN:
                    let_in.append((method, path, key, found))
            found = handshake(served, path, key) if real else 401  # the fake speaks HTTP only
            asked += 1
            if found not in (401, 403):
                let_in.append(("websocket", path, key, found))
    assert let_in == []
    known = {route for _, route, _ in routes}
    print(f"{len(known)} routes, {asked} requests without a key or with a wrong one: all refused")
    assert {"/invocations", "/tokenize", "/v1/chat/completions", "/health", "/metrics"} <= known
    if real:
        assert {"/openapi.json", "/docs", "/collective_rpc", "/v1/realtime"} <= known, sorted(known)
        shown = set(json.loads(status(served, "GET", "/openapi.json", served.key())[1])["paths"])
        assert shown <= known, "a route that the running server has, and the list lacks"


def test_open_paths_want_none_and_unknown_ones_do(served: Instance) -> None:
    for path in OPEN:
        assert status(served, "GET", path, "")[0] == 200
    for path in ("/nothing", "/v1", "/metrics/x", "/health/", "/Health", "/health%2f", "/v1/models?x=/health"):
        assert status(served, "GET", path, "")[0] == 401, path


def test_a_browser_may_ask_whether_it_may_ask(served: Instance, routes: list[tuple[str, str, list[str]]], kind: Kind) -> None:
    """A preflight carries no key. The CORS middleware answers it, and no route ever sees it."""
    if kind.name == "fake":
        pytest.skip("the fake has no CORS")
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for form, route, _ in routes:
        if form == "http":
            code, body = status(served, "OPTIONS", path_of(route), "", headers)
            assert (code, body) in ((200, b"OK"), (400, b"Disallowed CORS origin")), route


def test_with_the_key_one_gets_through(served: Instance) -> None:
    key = served.key()
    assert vllmctl(served, "show", "demo") == key
    for path in ("/v1/models", "/version", "/load"):
        assert status(served, "GET", path, key)[0] == 200
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key=key, max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["tiny"]
        assert api.chat.completions.create(**QUESTION, max_tokens=3).usage.completion_tokens == 3
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="sk-wrong", max_retries=0) as api, pytest.raises(openai.AuthenticationError, match="not valid"):
        api.models.list()
    assert status(served, "GET", "/v1/models", "", {"x-api-key": key})[0] == 200


def test_the_key_changes_under_a_stream_without_a_restart(served: Instance, kind: Kind) -> None:
    old, launch = served.key(), served.status()["launch_id"]
    url = f"http://127.0.0.1:{served.port}/v1"
    with openai.OpenAI(base_url=url, api_key=old, max_retries=0) as before:
        chunks = iter(before.chat.completions.create(**QUESTION, max_tokens=kind.tokens, stream=True))
        next(chunks)
        overlapping = vllmctl(served, "rotate", "demo")
        assert served.key() == overlapping != old
        for key in (old, overlapping):
            assert status(served, "GET", "/v1/models", key)[0] == 200
        new = vllmctl(served, "rotate", "demo", "--overlap", "0")
        vllmctl(served, "revoke", "demo", "default.old")
        assert [status(served, "GET", "/v1/models", key)[0] for key in (old, overlapping, new)] == [401, 401, 200]
        with pytest.raises(openai.AuthenticationError):
            before.models.list()
        assert list(chunks)[-1].choices[0].finish_reason == "length", "the stream that was let in ends as it would have"
    with openai.OpenAI(base_url=url, api_key=new, max_retries=0) as after:
        assert after.chat.completions.create(**QUESTION, max_tokens=2).usage.completion_tokens == 2
    assert served.status()["launch_id"] == launch


def test_no_key_is_seen_anywhere(served: Instance) -> None:
    seen = [served.key()]
    for process in [*served.engine(), procs.read(served.pid)]:
        assert process is not None
        found = process.cmdline + str(procs.environ_of(process.pid))
        assert not any(key in found for key in seen), process.comm
    told = served.log() + json.dumps(served.status()) + served.control("/metrics")[1]
    assert not any(key in told for key in seen)
    holders = {str(path.relative_to(served.root)) for path in served.root.rglob("*") if path.is_file() and seen[0].encode() in path.read_bytes()}
    assert holders == {"lib/instances/demo/keys.json", "lib/public/demo/credentials.json", "lib/public/credentials.json"}


def test_refusals_are_counted(served: Instance) -> None:
    def wrong() -> float:
        line = next(line for line in served.control("/metrics")[1].splitlines() if line.startswith("vllmd_requests_refused_total") and 'reason="wrong"' in line)
        return float(line.rpartition(" ")[2])

    before = wrong()
    assert before > 0
    status(served, "GET", "/v1/models", "sk-wrong")
    assert wrong() == before + 1
