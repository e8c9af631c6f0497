"""Each fault of the fake engine is what its table says: other tests rely on it without looking."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import procs
from tests.engine.server import NAME, EngineServer, Kind, bound, listens
from vllmd.models import demo

pytestmark = [pytest.mark.component, pytest.mark.timeout(60)]
FAKE = Path(__file__).resolve().parents[1] / "fakes" / "engine.py"
PROMPT = {"model": NAME, "prompt": "hi", "max_tokens": 3}
Start = Callable[..., EngineServer]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in demo.KINDS:
        demo.make(folder / kind, kind)
    return folder


@pytest.fixture
def start(models: Path) -> Iterator[Start]:
    """start(FAKE_X=..., ...) gives a server that is starting."""
    with contextlib.ExitStack() as stack:

        def start_one(*flags: str, model: str = "generate", uds: str = "", **modes: str) -> EngineServer:
            kind = Kind("fake", FAKE, models, 10, 200, env=modes)
            return stack.enter_context(contextlib.closing(EngineServer(kind, *flags, model=model, uds=uds)))

        yield start_one


@pytest.fixture
def ready(start: Start) -> Start:
    """As start, and waits for 200 on /health."""

    def start_ready(*flags: str, **modes: str) -> EngineServer:
        server = start(*flags, **modes)
        server.wait_ready()
        return server

    return start_ready


def test_is_ready_within_a_second(ready: Start) -> None:
    began = time.monotonic()
    ready()
    assert time.monotonic() - began < 2


def test_unknown_mode_is_refused(start: Start) -> None:
    server = start(FAKE_SPEEED="2")
    assert server.wait_exit(5) == 2
    assert "FAKE_SPEEED" in server.output()


def test_version_is_answered_without_a_start() -> None:
    assert subprocess.run([FAKE, "--version"], capture_output=True, check=True, timeout=10).stdout == b"0.32.0\n"


def test_runs_without_this_project(tmp_path: Path) -> None:
    """In a bare container only tests/fakes is there, and an old enough Python."""
    env = {"PATH": os.environ["PATH"], "FAKE_DUMP": str(tmp_path / "dump")}
    command = ["python3", "-I", "-S", str(FAKE), "serve", "--nonsense"]
    assert subprocess.run(command, cwd="/", env=env, capture_output=True, timeout=10, check=False).returncode == 2
    assert json.loads((tmp_path / "dump").read_text())["argv"][1:] == ["serve", "--nonsense"]


# Starting.


@pytest.mark.parametrize(
    ("modes", "code"), [({"FAKE_EXIT": "7@0.3", "FAKE_START_S": "30"}, 7), ({"FAKE_EXIT_READY": "0@0.2"}, 0), ({"FAKE_FAIL_FIRST": "1:{count}"}, 1)]
)
def test_exits_when_told(start: Start, tmp_path: Path, modes: dict[str, str], code: int) -> None:
    server = start(**{name: value.format(count=tmp_path / "count") for name, value in modes.items()}, FAKE_ERROR="out of memory")
    assert server.wait_exit(10) == code
    assert "ERROR" in server.output()
    assert "out of memory" in server.output()


def test_starts_that_shall_fail_first_are_followed_by_one_that_works(start: Start, ready: Start, tmp_path: Path) -> None:
    mode = f"1:{tmp_path / 'count'}"
    assert start(FAKE_FAIL_FIRST=mode).wait_exit(10) == 1
    ready(FAKE_FAIL_FIRST=mode)


def test_long_start_shows_percentages(start: Start) -> None:
    server = start(FAKE_START_S="2")
    procs.wait_until("a percentage", lambda: "50% Completed" in server.output(), 5)
    assert server.health() == "ConnectionRefusedError"
    server.wait_ready()


def cpu_s(server: EngineServer) -> float:
    fields = Path(f"/proc/{server.member('VLLM::Worker').pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("progress", "burns", "lines"), [("cpu", True, False), ("lines", False, True), ("none", False, False)])
def test_weak_progress_is_only_what_it_says(start: Start, progress: str, burns: bool, lines: bool) -> None:
    server = start(FAKE_START_S="100", FAKE_SPEED="2", FAKE_PROGRESS=progress, FAKE_LINE_S="0.2")
    procs.wait_until("a worker", lambda: any(process.comm == "VLLM::Worker" for process in server.members()))
    procs.wait_until("its first line", lambda: "Starting to load" in server.output())
    before, output = cpu_s(server), server.output()
    time.sleep(0.5)  # an observation of that length
    assert (cpu_s(server) - before > 0.1) is burns
    assert (server.output() != output) is lines


def test_never_binds(start: Start) -> None:
    server = start(FAKE_BIND="never")
    procs.wait_until("the end of the load", lambda: "init engine" in server.output())
    assert not bound(server.port)


def test_binds_and_never_listens(start: Start) -> None:
    server = start(FAKE_LISTEN="never")
    procs.wait_until("the end of the load", lambda: "init engine" in server.output())
    assert bound(server.port)
    assert not listens(server.port)


def test_headless_node_works_without_a_port(start: Start) -> None:
    server = start("--headless")
    procs.wait_until("the end of the load", lambda: "init engine" in server.output())
    assert server.process.poll() is None
    assert not bound(server.port)


def test_listens_and_never_answers(start: Start) -> None:
    server = start(FAKE_LISTEN="mute")
    procs.wait_until("a listener", lambda: listens(server.port))
    with pytest.raises(TimeoutError):
        server.ask("/health", timeout_s=0.5)


def test_second_on_a_port_that_is_only_bound_never_serves_and_never_ends(start: Start, models: Path) -> None:
    first = start(FAKE_START_S="1")
    procs.wait_until("a bound port", lambda: bound(first.port))
    second = EngineServer(Kind("fake", FAKE, models, 10, 1, env={"FAKE_START_S": "1"}), port=first.port)
    with contextlib.closing(second):
        first.wait_ready()
        procs.wait_until("its claim", lambda: "Application startup complete" in second.output())
        assert second.process.poll() is None


@pytest.mark.parametrize(("mode", "ends"), [("lost", False), ("wedge", False), ("die", True)])
def test_sigterm_while_starting(start: Start, mode: str, ends: bool) -> None:
    server = start(FAKE_START_S="1.5", FAKE_SIGTERM_STARTING=mode)
    procs.wait_until("EngineCore", lambda: "EngineCore pid" in server.output())
    server.signal(signal.SIGTERM)
    if ends:
        assert server.wait_exit(5) == 0
    elif mode == "lost":
        server.wait_ready()
    else:
        procs.wait_until("the end of the load", lambda: "init engine" in server.output())
        assert server.health() == "ConnectionRefusedError"
        server.signal(signal.SIGTERM)
        assert server.wait_exit(5) == 0


def test_sigterm_during_the_imports_ends_it_by_the_signal(start: Start) -> None:
    server = start(FAKE_START_S="20")
    procs.wait_until("its name", lambda: server.process.poll() is not None or any(p.comm == "vllm" for p in server.members()))
    server.signal(signal.SIGTERM)
    assert server.wait_exit(5) == -signal.SIGTERM


# Serving.


@pytest.mark.parametrize(("mode", "status"), [("400", 400), ("500", 500)])
def test_healthy_but_broken(ready: Start, mode: str, status: int) -> None:
    server = ready(FAKE_COMPLETIONS=mode)
    assert server.ask("/v1/completions", PROMPT)[0] == status
    assert server.health() == 200


def test_completion_without_a_token_and_completion_that_hangs(ready: Start) -> None:
    assert ready(FAKE_COMPLETIONS="empty").ask("/v1/completions", PROMPT)[1]["choices"] == []
    with pytest.raises(TimeoutError):
        ready(FAKE_COMPLETIONS="hang").ask("/v1/completions", PROMPT, timeout_s=0.5)


def test_health_turns_to_503_at_its_time(start: Start, ready: Start) -> None:
    always = start(FAKE_HEALTH="503")
    procs.wait_until("503", lambda: always.health() == 503)
    later = ready(FAKE_HEALTH="503@0.5")
    procs.wait_until("503", lambda: later.health() == 503)


def test_slow_health_answers_late(start: Start) -> None:
    server = start(FAKE_HEALTH_DELAY_S="0.7")
    procs.wait_until("a listener", lambda: listens(server.port))
    began = time.monotonic()
    assert server.health() == 200
    assert time.monotonic() - began >= 0.7
    never = start(FAKE_HEALTH_DELAY_S=str(math.inf))
    procs.wait_until("a listener", lambda: listens(never.port))
    with pytest.raises(TimeoutError):
        never.ask("/health", timeout_s=0.5)


def test_listener_closes_while_the_process_lives(ready: Start) -> None:
    server = ready(FAKE_LISTEN="close@0.3")
    procs.wait_until("refused connections", lambda: server.health() == "ConnectionRefusedError")
    assert server.process.poll() is None


def test_heartbeat_stands_still_under_load_or_moves_without_any(ready: Start) -> None:
    frozen, ghost = ready(FAKE_HEARTBEAT="frozen"), ready(FAKE_HEARTBEAT="ghost")
    assert frozen.ask("/v1/completions", PROMPT)[0] == 200
    assert frozen.metric("vllm:iteration_tokens_total_count") == 0
    before = ghost.metric("vllm:iteration_tokens_total_count")
    procs.wait_until("a beat", lambda: ghost.metric("vllm:iteration_tokens_total_count") > before)


def test_more_requests_than_slots_wait(ready: Start) -> None:
    server = ready("--max-num-seqs", "1", FAKE_TOKEN_S="0.02")
    with server.stream(200) as one, server.stream(200) as two:
        next(one)
        procs.wait_until("one that waits", lambda: server.metric("vllm:num_requests_waiting") == 1)
        assert server.metric("vllm:num_requests_running") == 1
        assert next(one)
    del two
    procs.wait_until("requests without clients to end", lambda: server.metric("vllm:num_requests_running") == 0)


def test_metrics_can_be_huge_garbage_or_broken(ready: Start) -> None:
    assert len(ready(FAKE_METRICS="huge").ask("/metrics")[1]) > 60_000_000
    assert "NaNsense" in ready(FAKE_METRICS="garbage").ask("/metrics")[1]
    assert ready(FAKE_METRICS="500").ask("/metrics")[0] == 500
    for mode in ("slow", "hang"):
        server = ready(FAKE_METRICS=mode)
        with pytest.raises(TimeoutError):
            until_byte(server, 40)


def until_byte(server: EngineServer, count: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=1) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        deadline = time.monotonic() + 1
        body = b""
        while len(body.partition(b"\r\n\r\n")[2]) < count:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            body += sock.recv(65536)


def test_scores_where_the_model_is_a_classifier(ready: Start) -> None:
    server = ready(model="score")
    answer = server.ask("/v1/score", {"model": NAME, "text_1": "a", "text_2": ["b", "c"]})[1]
    assert len(answer["data"]) == 2


# Dying and stopping.


@pytest.mark.parametrize("comm", ["VLLM::EngineCore", "VLLM::Worker"])
def test_death_of_a_part_ends_all_with_0(ready: Start, comm: str) -> None:
    server = ready(FAKE_DEATH_S="0.5")
    killed = server.signal(signal.SIGKILL, comm)
    procs.wait_until("503", lambda: server.health() == 503, 0.3)
    assert server.wait_exit(5) == 0
    assert 0.3 < time.monotonic() - killed < 1.5
    server.wait_empty()


def test_core_exits_or_stops_by_itself(ready: Start) -> None:
    assert ready(FAKE_CORE="exit@0.2", FAKE_DEATH_S="0.1").wait_exit(5) == 0
    server = ready(FAKE_CORE="stop@0.2")
    procs.wait_until("a stopped core", lambda: server.member("VLLM::EngineCore").state == "T")
    assert server.health() == 200


def test_sigterm_ignored(ready: Start) -> None:
    server = ready(FAKE_SIGTERM="ignore")
    server.signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait_exit(1)
    assert server.health() == 200


@pytest.mark.parametrize("timeout", ["0", "1"])
def test_stop_hangs_when_a_stream_outlives_the_shutdown_timeout(ready: Start, timeout: str) -> None:
    server = ready("--shutdown-timeout", timeout, FAKE_TOKEN_S="0.05")
    with server.stream(2000) as events:
        next(events)
        server.signal(signal.SIGTERM)
        procs.wait_until("the hang", lambda: "Waiting for connections to close" in server.output())
        server.signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait_exit(1)


def test_stray_has_left_family_name_session_and_environment(ready: Start) -> None:
    os.environ.pop("FAKE_STRAY", None)
    before = {process.pid for process in procs.processes()}
    server = ready(FAKE_STRAY="setsid,fork,rename,ignore,env,port")
    stray = next(process for process in procs.processes() if process.pid not in before and process.comm == "innocent")
    try:
        assert (stray.cmdline, procs.environ_of(stray.pid)) == ("innocent", {})
        assert stray.sid not in (server.pid, stray.pid)
        os.kill(stray.pid, signal.SIGTERM)
        server.close()
        assert procs.is_alive(stray.pid)
        assert bound(server.port)
    finally:
        procs.kill_all([stray.pid])
    assert not bound(server.port)
    server.folder.mkdir()  # the fixture closes it once more


# Output and litter.


@pytest.mark.parametrize(
    ("mode", "mark"), [("flood", b"[flood.py:1]"), ("long", b"x" * 9_000_000), ("broken", b"caf\xe9 \xe2\x82 half")]
)
def test_output_floods_or_is_broken(ready: Start, mode: str, mark: bytes) -> None:
    server = ready(FAKE_OUTPUT=mode, FAKE_OUTPUT_MB="20" if mode != "broken" else "0.01")
    out = server.folder / "out"
    procs.wait_until("its output", lambda: out.stat().st_size > (19e6 if mode != "broken" else 9e3), 30)
    assert mark in out.read_bytes()
    assert server.health() == 200


def test_silent_engine_prints_nothing(ready: Start) -> None:
    assert ready(FAKE_OUTPUT="silent").output() == ""


def test_litter_stays_behind(ready: Start) -> None:
    server = ready(FAKE_SHM_MB="3")
    block = Path(f"/dev/shm/psm_fake-engine-{server.pid}")
    try:
        server.signal(signal.SIGTERM)
        assert server.wait_exit(5) == 0
        assert block.stat().st_size == 3 << 20
        assert (server.folder / f"fake-engine-{server.pid}-ipc").is_socket()
        server.wait_empty()
    finally:
        block.unlink()
