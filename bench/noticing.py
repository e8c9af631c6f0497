"""Faults of a ready engine: from the moment they happen until the supervisor has told systemd that it stops (STOPPING=1).

The engine is the fake one of the tests, whose processes, health and metrics are those of vLLM. Intervals are the defaults; hang_timeout_s
and the proof of life's are short, and what is shown is the time beyond them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import group, processes
from bench.place import MARK, BenchError, Place
from bench.table import Figure

FAKE = Path(__file__).resolve().parent.parent / "tests/fakes/engine.py"
API_BAR_S, PART_BAR_S, HANG_BAR_S = 0.05, 0.5, 2.0
KILLS, HANGS = 10, 3
HANG_S, CANARY_S, CANARY_TIMEOUT_S = 3.0, 3.0, 2.0
LOADED_S = 6.0
"""Until the watch has seen the load, at its idle interval."""
TIMEOUT_S = 60.0
CONFIG: Mapping[str, Any] = {
    "engine": {"executable": str(FAKE), "env": {"FAKE_SPEED": "3", "FAKE_TOKEN_S": "0.06"}},
    "watch": {"hang_timeout_s": HANG_S, "first_request_timeout_s": HANG_S, "canary_interval_s": CANARY_S, "canary_timeout_s": CANARY_TIMEOUT_S},
}


def run() -> list[Figure]:
    with Place(cgroup=group.available(), config=CONFIG) as place:
        deaths = {comm: [_fault(place, comm, signal.SIGKILL) for _ in range(KILLS)] for comm in ("vllm", "VLLM::EngineCor", "VLLM::Worker")}
        loaded = [_hang(place) - HANG_S for _ in range(HANGS)]
        idle = [_fault(place, "VLLM::EngineCor", signal.SIGSTOP) - CANARY_S - CANARY_TIMEOUT_S for _ in range(HANGS)]
    health = "vLLM's own /health: never"
    return [
        Figure("death noticed: API server", deaths["vllm"], bar=API_BAR_S, judged="p99", against="by its pidfd"),
        Figure("  EngineCore", deaths["VLLM::EngineCor"], bar=PART_BAR_S, judged="p99", against="vLLM itself exits after 3 s, with 0"),
        Figure("  Worker", deaths["VLLM::Worker"], bar=PART_BAR_S, judged="p99", against="vLLM itself exits after 3 s, with 0"),
        Figure("hang under load noticed, beyond hang_timeout after the last heartbeat", loaded, bar=HANG_BAR_S, judged="p99", against=health),
        Figure("hang that begins idle noticed, beyond canary_interval and its deadline", idle, bar=HANG_BAR_S, judged="p99", against=health),
    ]


def _fault(place: Place, comm: str, number: int) -> float:
    place.start()
    place.ready_at()
    time.sleep(0.3)
    return _seconds_to_stop(place, comm, number)


def _hang(place: Place) -> float:
    place.start()
    place.ready_at()
    with _load(place.port):
        time.sleep(LOADED_S)
        return _seconds_to_stop(place, "VLLM::EngineCor", signal.SIGSTOP)


def _seconds_to_stop(place: Place, comm: str, number: int) -> float:
    family = [pid for pid in processes.marked(MARK, str(place.root)) if pid != place.pid]
    (victim,) = [pid for pid in family if _comm(pid) == comm]
    blocks = set().union(*map(processes.shared_memory, family))
    began = time.monotonic()
    os.kill(victim, number)
    place.wait_exit()
    told = place.notify.time_of(b"STOPPING=1")
    for block in blocks:
        block.unlink(missing_ok=True)
    if not told:
        raise BenchError(f"the end was never told\n{place.log()[-2000:]}")
    return told - began


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@contextlib.contextmanager
def _load(port: int) -> Iterator[None]:
    """A request in flight; nobody reads its answer."""
    body = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 2000}).encode()
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as link:
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        yield
