"""The engine's guard, by itself: an ASGI middleware that is asked in every way that a server could ask it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.core.keyring import Key
from vllmd.engines import vllm_guard
from vllmd.engines.guard import vllmd_guard
from vllmd.engines.guard.vllmd_guard import Guard
from vllmd.instance import keys

pytestmark = pytest.mark.unit

KEY = "P5atXS814LgCgPDd3sg0Mw"
OTHER = "WodTWE6V0zVqXx0h2Ah2dC"
BEARER = (b"authorization", f"Bearer {KEY}".encode())
PREFLIGHT = [(b"origin", b"https://a.example"), (b"access-control-request-method", b"POST")]


class Asked:
    """One connection: what came back, and whether the app behind was reached."""

    def __init__(self, file: Path | str) -> None:
        self.reached = False
        self.sent: list[Mapping[str, Any]] = []
        self.guard = Guard(self._app, str(file))

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached = True

    async def _receive(self) -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    def ask(self, headers: Iterable[tuple[bytes, bytes]] = (), path: str = "/v1/models", kind: str = "http", **more: Any) -> int:
        """The status; 200 where the app was reached."""
        self.reached, self.sent = False, []
        scope = {"type": kind, "path": path, "headers": list(headers), **({"method": "GET"} if kind == "http" else {}), **more}
        work = self.guard(scope, self._receive, self._send)
        with pytest.raises(StopIteration):
            work.send(None)
        if self.reached:
            assert not self.sent
            return 200
        return int(self.sent[0].get("status", self.sent[0].get("code", 0)))


def write(file: Path, *held: str | Key, open_paths: tuple[str, ...] = ("/health", "/metrics")) -> Path:
    """By another inode, as the supervisor does it."""
    beside = file.with_suffix(".new")
    beside.write_text(keys.guard_document(tuple(key if isinstance(key, Key) else Key("k", key) for key in held), open_paths))
    beside.chmod(0o600)
    return beside.replace(file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "guard.json", KEY)


@pytest.fixture
def asked(file: Path) -> Asked:
    return Asked(file)


def test_a_key_opens_every_path_and_without_one_only_the_open_ones(asked: Asked) -> None:
    for path in ("/v1/models", "/", "/invocations", "/tokenize", "/docs", "/metrics/", "/health/", "//health", "/Health", "/health/x", "/healthz", "/v1/../health", "", "*"):
        assert asked.ask(path=path) == 401, path
        assert asked.ask([BEARER], path) == 200, path
    for path in ("/health", "/metrics"):
        assert asked.ask(path=path) == 200
        assert asked.ask([(b"authorization", b"Bearer wrong")], path) == 200


def test_the_path_is_the_one_that_the_app_will_look_up(asked: Asked) -> None:
    """Below --root-path the same route is reached by two paths; neither opens another route."""
    assert asked.ask(path="/api/health", root_path="/api") == 200
    assert asked.ask(path="/health", root_path="/api") == 200
    assert asked.ask(path="/apihealth", root_path="/api") == 401
    assert asked.ask(path="/health/tokenize", root_path="/health") == 401
    assert asked.ask(path="/health", root_path="/health") == 401


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", f"Bearer {KEY}".encode())],
        [(b"Authorization", f"bearer {KEY}".encode())],
        [(b"AUTHORIZATION", f"BEARER   {KEY}  ".encode())],
        [(b"x-api-key", KEY.encode())],
        [(b"X-API-Key", f" {KEY} ".encode())],
    ],
)
def test_ways_to_send_the_key(asked: Asked, headers: list[tuple[bytes, bytes]]) -> None:
    assert asked.ask(headers) == 200
    assert asked.ask(headers, kind="websocket") == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", KEY.encode())],
        [(b"authorization", f"Bearer{KEY}".encode())],
        [(b"authorization", f"Bearer\t{KEY}".encode())],
        [(b"authorization", f"Token {KEY}".encode())],
        [(b"authorization", f"Basic {KEY}".encode())],
        [(b"authorization", f"Bearer {KEY} x".encode())],
        [(b"authorization", f"Bearer {KEY},Bearer {OTHER}".encode())],
        [(b"authorization", f"Bearer {KEY}\x00".encode())],
        [(b"authorization", f"Bearer {KEY.upper()}".encode())],
        [(b"authorization", f"Bearer {KEY[:-1]}".encode())],
        [(b"authorization", f"Bearer {KEY}0".encode())],
        [(b"authorization", "Bearer clé".encode())],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", b"Bearer " + b"a" * 1_000_000)],
        [(b"authorization", hashlib.sha256(KEY.encode()).hexdigest().encode())],
        [(b"authorization", b"Bearer " + hashlib.sha256(KEY.encode()).hexdigest().encode())],
        [(b"x-api-key", b"")],
        [(b"cookie", f"key={KEY}".encode())],
        [BEARER, BEARER],
        [BEARER, (b"authorization", b"Bearer wrong")],
        [BEARER, (b"x-api-key", KEY.encode())],
        [BEARER, (b"Authorization", b"")],
    ],
)
def test_everything_else_is_refused(asked: Asked, headers: list[tuple[bytes, bytes]]) -> None:
    assert asked.ask(headers) == 401
    assert asked.ask(headers, kind="websocket") == 1008


@given(st.lists(st.tuples(st.sampled_from([b"authorization", b"Authorization", b"x-api-key", b"host"]), st.binary(max_size=64)), max_size=4), st.text(max_size=12))
def test_nothing_that_is_not_the_key_is_let_in(tmp_path_factory: pytest.TempPathFactory, headers: list[tuple[bytes, bytes]], path: str) -> None:
    asked = Asked(write(tmp_path_factory.mktemp("guard") / "guard.json", KEY))
    assert asked.ask(headers, f"/v1/{path}") == 401


def test_the_refusal_is_one_that_clients_understand(asked: Asked) -> None:
    asked.ask()
    start, end = asked.sent
    body = json.loads(end["body"])
    headers = dict(start["headers"])
    assert (start["status"], headers[b"www-authenticate"], headers[b"content-type"]) == (401, b"Bearer", b"application/json")
    assert headers[b"content-length"] == str(len(end["body"])).encode()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == "invalid_api_key"
    asked.ask([(b"authorization", b"Bearer s3cret-but-wrong")])
    assert b"s3cret" not in asked.sent[1]["body"]


def test_a_socket_is_refused_by_an_answer_where_the_server_can(asked: Asked) -> None:
    assert asked.ask(kind="websocket", extensions={"websocket.http.response": {}}) == 401
    assert [message["type"] for message in asked.sent] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert asked.ask(path="/health", kind="websocket") == 1008, "an open path is open to HTTP"
    assert asked.ask(PREFLIGHT, kind="websocket") == 1008


def test_lifespan_passes_and_an_unknown_kind_does_not(asked: Asked) -> None:
    assert asked.ask(kind="lifespan") == 200
    asked.reached = False
    with pytest.raises(RuntimeError, match="webtransport"):
        asked.guard({"type": "webtransport", "headers": []}, asked._receive, asked._send).send(None)
    assert not asked.reached


def test_only_what_cors_answers_passes_as_options(asked: Asked) -> None:
    """Starlette's CORSMiddleware answers exactly what has both headers; anything else would reach a route."""
    assert asked.ask(PREFLIGHT, method="OPTIONS") == 200
    assert asked.ask(PREFLIGHT[:1], method="OPTIONS") == 401
    assert asked.ask(PREFLIGHT[1:], method="OPTIONS") == 401
    assert asked.ask([], method="OPTIONS") == 401
    assert asked.ask(PREFLIGHT, method="POST") == 401
    assert asked.ask(PREFLIGHT, method="options") == 401


# The file


def test_a_change_of_the_file_holds_for_the_next_request(asked: Asked, file: Path) -> None:
    new = [(b"authorization", f"Bearer {OTHER}".encode())]
    assert (asked.ask([BEARER]), asked.ask(new)) == (200, 401)
    write(file, KEY, OTHER)
    assert (asked.ask([BEARER]), asked.ask(new)) == (200, 200)
    write(file, OTHER, open_paths=())
    assert (asked.ask([BEARER]), asked.ask(new), asked.ask(path="/health")) == (401, 200, 401)


def test_a_key_ends_at_its_time(file: Path, asked: Asked) -> None:
    write(file, Key("old", KEY, until=time.time() + 0.3), Key("new", OTHER, until=None))
    assert asked.ask([BEARER]) == 200
    time.sleep(0.35)
    assert asked.ask([BEARER]) == 401


BROKEN: Mapping[str, bytes] = {
    "empty": b"",
    "cut": b'{"schema": 1, "open_paths": [], "keys": [',
    "no mapping": b"[]",
    "null": b"null",
    "another schema": b'{"schema": 2, "open_paths": ["/v1/models"], "keys": []}',
    "no keys": b'{"schema": 1, "open_paths": ["/v1/models"]}',
    "keys of another kind": b'{"schema": 1, "open_paths": ["/v1/models"], "keys": {"a": 1}}',
    "a sum that is short": b'{"schema": 1, "open_paths": ["/v1/models"], "keys": [{"sha256": "00"}]}',
    "a sum that is none": b'{"schema": 1, "open_paths": ["/v1/models"], "keys": [{"sha256": "zz"}]}',
    "open paths as text": b'{"schema": 1, "open_paths": "/v1/models", "keys": []}',
    "an end that is none": json.dumps({"schema": 1, "open_paths": ["/v1/models"], "keys": [{"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "until": "x"}]}).encode(),
    "bytes": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "large": b'{"schema": 1, "open_paths": [], "keys": []}' + b" " * (1 << 20),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_broken_lets_nobody_in(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "guard.json"
    file.write_bytes(BROKEN[kind])
    file.chmod(0o600)
    asked = Asked(file)
    assert [asked.ask([BEARER]), asked.ask(), asked.ask(path="/health"), asked.ask([BEARER, BEARER])] == [503] * 4
    said = capfd.readouterr().err
    assert said.count("every request is refused") == 1, "once, not for each request"
    assert str(file) in said
    write(file, KEY)
    assert asked.ask([BEARER]) == 200


def test_a_file_that_goes_away_takes_the_keys_with_it(asked: Asked, file: Path) -> None:
    """What was open is open still: a health check must not fail for it."""
    assert asked.ask([BEARER]) == 200
    file.unlink()
    assert (asked.ask([BEARER]), asked.ask(), asked.ask(path="/health")) == (503, 503, 200)
    file.symlink_to(write(file.with_name("elsewhere.json"), KEY))
    assert asked.ask([BEARER]) == 503
    file.unlink()
    os.mkfifo(file)
    assert asked.ask([BEARER]) == 503
    file.unlink()
    write(file, KEY)
    assert asked.ask([BEARER]) == 200
    file.chmod(0o666)
    assert asked.ask([BEARER]) == 503, "somebody else may have written it"


def test_no_file_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllmd_guard.FILE_VARIABLE, raising=False)
    asked = Asked("")
    asked.guard = Guard(asked._app)
    assert asked.ask([BEARER]) == 503


def test_the_keys_themselves_stand_nowhere(file: Path, asked: Asked) -> None:
    asked.ask([BEARER])
    assert KEY not in file.read_text()
    assert KEY not in repr(vars(asked.guard.rules)) + repr(vars(asked.guard.counts))


def test_every_key_is_compared_also_when_one_has_matched(file: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, KEY, OTHER, "third-key")
    compared = []
    real = hmac.compare_digest

    def compare(one: bytes, two: bytes) -> bool:
        compared.append((len(one), len(two)))
        return real(one, two)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert asked.ask([BEARER]) == 200
    assert asked.ask([(b"authorization", b"Bearer x")]) == 401
    assert compared == [(32, 32)] * 6


# Counts


def test_refusals_are_counted_by_reason_and_process(asked: Asked, file: Path) -> None:
    counts = file.parent / vllmd_guard.COUNTS
    asked.ask()
    assert not counts.exists(), "without a directory nothing is counted"
    counts.mkdir()
    asked = Asked(file)
    asked.ask()
    asked.ask([BEARER])
    asked.ask([BEARER, BEARER])
    for _ in range(9):
        asked.ask([(b"x-api-key", b"wrong")])
    assert (counts / str(os.getpid())).read_text() == "1 1 9 0\n"
    assert (counts / str(os.getpid())).stat().st_mode & 0o777 == 0o600
    os.close(asked.guard.counts._file)


def test_it_runs_under_another_python_that_has_nothing_of_ours(file: Path) -> None:
    """-S: not even site-packages. As a server does it: found on PYTHONPATH, made with the app alone."""
    code = (
        "import sys, vllmd_guard\n"
        "async def app(scope, receive, send): print('reached')\n"
        "async def send(message): print(message.get('status', ''))\n"
        f"for headers in ([], [(b'authorization', b'Bearer {KEY}')]):\n"
        "    try: vllmd_guard.Guard(app)({'type': 'http', 'path': '/', 'method': 'GET', 'headers': headers}, None, send).send(None)\n"
        "    except StopIteration: pass\n"
        "assert not any(name.startswith('vllmd.') for name in sys.modules)\n"
    )
    env = {"PYTHONPATH": str(vllm_guard._DIRECTORY), vllmd_guard.FILE_VARIABLE: str(file), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr, done.returncode) == (["401", "reached"], "", 0)


def test_it_has_no_syntax_that_python_3_9_lacks() -> None:
    import ast

    source = Path(str(vllmd_guard.__file__)).read_text()
    ast.parse(source, feature_version=(3, 9))
    assert {path.name for path in vllm_guard._DIRECTORY.glob("*.py")} == {"__init__.py", "vllmd_guard.py"}, "all that the engine finds there"


def test_a_key_of_any_length_costs_no_more_than_one_of_512(file: Path, asked: Asked) -> None:
    """What is longer is not even hashed."""
    longest = "k" * 512
    write(file, longest, longest + "k")
    assert asked.ask([(b"authorization", f"Bearer {longest}".encode())]) == 200
    assert asked.ask([(b"authorization", f"Bearer {longest}k".encode())]) == 401
