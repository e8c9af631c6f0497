"""The fault matrix against the real vLLM: from the fault to the verdict, and from there to an engine without processes.

Each row costs a start of half a minute or more: `make test` has one of them (test_daemon_real and test_real_engine have
others), `make soak` all. The table stands at the end of the run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGSTOP, Signals
from typing import Any

import pytest

from tests import procs
from tests.component.daemons import watch_for
from tests.engine.load import Streams, endless, flowing, prefill
from tests.engine.server import ENDLESS, REAL_ENV
from tests.harness import Instance, merged
from tests.matrix import Row, measured, watch_the_end

pytestmark = [pytest.mark.engine, pytest.mark.matrix, pytest.mark.timeout(900)]

READY_S = 180.0
HANG_S, CANARY_S, CANARY_TIMEOUT_S, LOOK_S = 6.0, 6.0, 4.0, 1.0
HUNG_BUSY_S = HANG_S + 2
HUNG_IDLE_S = CANARY_S + CANARY_TIMEOUT_S + 2
SLACK_S = 0.5
"""What two cores that a real vLLM keeps busy may add to bounds of milliseconds."""
STORM_S = float(os.environ.get("VLLMD_SOAK_STORM_S", "600"))
PREFILLS = 3
"""Of 50,000 tokens each; in steps of 512 tokens one took 45 s on two cores, in which vLLM's counter of iterations stood still."""
WATCH: dict[str, Any] = {
    "interval_s": LOOK_S,
    "request_timeout_s": 2,
    "hang_timeout_s": HANG_S,
    "first_request_timeout_s": HANG_S,
    "canary_interval_s": CANARY_S,
    "canary_timeout_s": CANARY_TIMEOUT_S,
}


@dataclass(frozen=True)
class Fault:
    """To `victim`, or to each process of the engine."""

    number: Signals
    victim: str
    busy: bool
    bound_s: float
    code: str

    @property
    def name(self) -> str:
        return f"{self.number.name} of {self.victim}, {'under load' if self.busy else 'idle'}"


KILLS = {"main": (0.05, "engine_exited"), "VLLM::EngineCore": (0.5, "engine_died"), "VLLM::Worker": (0.5, "engine_died")}
FAULTS = [
    *(Fault(SIGKILL, victim, busy, bound + SLACK_S, code) for victim, (bound, code) in KILLS.items() for busy in (False, True)),
    *(Fault(SIGSTOP, victim, busy, HUNG_BUSY_S if busy else HUNG_IDLE_S, "engine_hung") for victim in (*KILLS, "everything") for busy in (False, True)),
]
IN_MAKE_TEST = {("SIGSTOP", "VLLM::Worker", True)}


def marks(fault: Fault) -> Any:
    soak = (fault.number.name, fault.victim, fault.busy) not in IN_MAKE_TEST
    return pytest.param(fault, id=fault.name, marks=[pytest.mark.soak] if soak else [])


def instance(executable: Path, models: Path, config: dict[str, Any] | None = None) -> Instance:
    """Not started. Without a key: the watch needs none for what it reads, and its own requests are tested with one elsewhere."""
    args = {"enforce-eager": True, "dtype": "float32"}
    own = {"model": {"path": str(models / "generate")}, "serve": {"auth": "none"}, "gpus": "none", "engine": {"args": args, "env": REAL_ENV}, "watch": WATCH}
    return Instance(config=merged(own, config or {}), engine=executable, cgroup=True)


@pytest.mark.parametrize("fault", [marks(fault) for fault in FAULTS])
def test_a_fault_of_the_real_engine_is_noticed_and_leaves_nothing(fault: Fault, real_engine: Path, tiny_models: Path) -> None:
    with instance(real_engine, tiny_models) as served, measured(fault.name, fault.bound_s) as row:
        served.wait_ready(READY_S)
        with load(served, fault) as streams:
            victims = [process.pid for process in served.engine()] if fault.victim == "everything" else [served.engine_process(fault.victim).pid]
            at = time.monotonic()
            for pid in victims:
                os.kill(pid, fault.number)
            watch_the_end(served, row, at, within_s=fault.bound_s + 30)
            assert streams is None or streams.last_at < at + fault.bound_s
        row.said = said(served, fault.code)
        assert not served.engine()


@contextlib.contextmanager
def load(served: Instance, fault: Fault) -> Iterator[Streams | None]:
    if not fault.busy:
        yield None
        return
    with flowing(served.port, 4, ENDLESS) as streams:
        time.sleep(2 * LOOK_S)  # the watch has seen it move: until then a first request may compile
        yield streams


def said(served: Instance, code: str) -> str:
    status = served.wait_exit(30)
    error = served.last_json()["error"]
    assert (status, error["code"]) == (75 if code == "engine_hung" else 70, code), served.describe()
    return f"{status} {code}: {error['what']}"


# What is no fault, whatever it looks like.


@pytest.mark.soak
def test_a_storm_of_slow_readers_is_no_fault(real_engine: Path, tiny_models: Path) -> None:
    """200 streams that are read at 256 bytes a second each, for ten minutes: ten times the time after which a hang counts as one."""
    with instance(real_engine, tiny_models) as served, measured(f"200 streams with slow readers for {STORM_S:g} s") as row:
        served.wait_ready(READY_S)
        with Streams(served.port, [endless(ENDLESS)] * 200, bytes_per_s=256) as streams:
            watch_for(STORM_S, served, lambda: served.daemon and served.daemon.poll() is None)
            row.said = f"no verdict; {streams.received >> 10} KiB read, {streams.ended} streams ended"
            assert streams.received
        answers_again(served, row)


@pytest.mark.soak
@pytest.mark.parametrize("chunk", [512, 8192])
def test_prefills_as_long_as_the_machine_makes_them_are_no_fault(chunk: int, real_engine: Path, tiny_models: Path) -> None:
    """Prompts that take many times the hang's time in all, in steps of which each takes less."""
    args = {"max-num-batched-tokens": chunk, "enable-prefix-caching": False}
    with instance(real_engine, tiny_models, {"engine": {"args": args}}) as served, measured(f"prefills in steps of {chunk} tokens") as row:
        served.wait_ready(READY_S)
        began = time.monotonic()
        with Streams(served.port, [prefill(50_000, seed) for seed in range(PREFILLS)]) as streams:
            procs.wait_until("the end of the prefills", lambda: streams.ended == PREFILLS or served.daemon is None or served.daemon.poll() is not None, 500, 0.1)
            assert streams.ended == PREFILLS
        took = time.monotonic() - began
        row.said = f"no verdict; {took:.0f} s"
        assert took > 2 * HANG_S, "too short to prove anything"
        answers_again(served, row)


def answers_again(served: Instance, row: Row) -> None:
    assert served.daemon is not None
    assert served.daemon.poll() is None, served.describe()
    assert "1" not in served.notify.told("STOPPING")
    assert served.status()["state"] == "ready"
    row.held = True
    served.signal(15)
    assert served.wait_exit(90) == 0
