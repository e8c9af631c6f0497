"""The fault matrix against the fake engine: each row's verdict within its bound, the right status, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests import procs
from tests.cgroups import PidsLimit
from tests.component.daemons import Tampered, assert_nothing_left, ends, quick, stop, watch_for
from tests.component.test_daemon_output import resident_mib
from tests.component.test_daemon_stop import open_stream
from tests.harness import Instance
from tests.matrix import EVIDENCE_S, Row, measured, wait_for_the_death_of, watch_the_end

pytestmark = [pytest.mark.component, pytest.mark.matrix, pytest.mark.timeout(120)]

SLACK_S = 1.0
"""What two busy cores may add to a bound; the benchmark holds the bound itself."""
WATCH_S = 0.2
NASTY = "setsid,fork,rename,ignore,env"


@dataclass(frozen=True)
class Fault:
    """`fake` makes it or `provoke` does and returns when; the instance ends with `status` and `code` within `bound_s`."""

    status: int
    code: str
    bound_s: float
    fake: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    provoke: Callable[[Instance], float] | None = None
    ready: bool = True


def exits_by_itself(instance: Instance) -> float:
    return wait_for_the_death_of(instance.engine_process("main").pid)


def kill(comm: str) -> Callable[[Instance], float]:
    def provoke(instance: Instance) -> float:
        instance.kill_engine(comm)
        return time.monotonic()

    return provoke


def sees(status: int) -> Callable[[Instance], float]:
    def provoke(instance: Instance) -> float:
        procs.wait_until(f"{status} on /health", lambda: instance.ask("/health")[0] == status)
        return time.monotonic()

    return provoke


def listener_closes(instance: Instance) -> float:
    def refuses() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", instance.port)) != 0

    procs.wait_until("a port that refuses", refuses)
    return time.monotonic()


def spawned(instance: Instance) -> float:
    instance.wait_state("starting")
    return time.monotonic()


STALLS: Mapping[str, Any] = {"start": {"stall_timeout_s": 1.0, "start_timeout_s": 3.0}}
FAULTS = {
    "exit 0 by itself": Fault(70, "engine_exited", SLACK_S, {"FAKE_EXIT_READY": "0@3"}, provoke=exits_by_itself),
    "SIGKILL of the API server": Fault(70, "engine_exited", SLACK_S, provoke=kill("vllm")),
    "never binds": Fault(75, "", 3 + SLACK_S, {"FAKE_BIND": "never"}, STALLS, spawned, ready=False),
    "binds, never listens": Fault(75, "", 3 + SLACK_S, {"FAKE_LISTEN": "never"}, STALLS, spawned, ready=False),
    "listens, never accepts": Fault(75, "", 3 + SLACK_S, {"FAKE_LISTEN": "mute"}, STALLS, spawned, ready=False),
    "accepts, never answers": Fault(75, "", 3 + SLACK_S, {"FAKE_HEALTH_DELAY_S": "inf"}, STALLS, spawned, ready=False),
    "503 for ever, from the start": Fault(75, "", 3 + SLACK_S, {"FAKE_HEALTH": "503"}, STALLS, spawned, ready=False),
    # the first look may be a moment old, and after it each comes after an interval
    "503 for ever, once ready": Fault(70, "engine_unhealthy", 3 * WATCH_S + SLACK_S, {"FAKE_HEALTH": "503@1"}, provoke=sees(503)),
    "the listener closes": Fault(70, "engine_unhealthy", 3 * WATCH_S + SLACK_S, {"FAKE_LISTEN": "close@1"}, provoke=listener_closes),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed_within_its_bound_and_leaves_nothing(name: str) -> None:
    fault = FAULTS[name]
    config = {"watch": {"interval_s": WATCH_S}, **fault.config}
    with quick(fault.fake, config, cgroup=True) as instance, measured(name, fault.bound_s) as row:
        if fault.ready:
            instance.wait_ready()
        assert fault.provoke is not None
        watch_the_end(instance, row, fault.provoke(instance), within_s=fault.bound_s + 10)
        ended(instance, row, fault.status, fault.code, ready=fault.ready)


def ended(instance: Instance, row: Row, status: int, code: str = "", *, ready: bool = True) -> dict[str, Any]:
    assert instance.wait_exit() == status, instance.describe()
    error: dict[str, Any] = instance.last_json()["error"]
    row.said = f"{status} {error['code']}: {error['what']}"
    summary = newest_incident(instance)
    assert summary["took_s"] < EVIDENCE_S
    return ends(instance, status, code or error["code"], ready=ready)


def newest_incident(instance: Instance) -> dict[str, Any]:
    """Its summary; what it holds is bounded."""
    folder = max((instance.state / "incidents").iterdir())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 << 20
    return dict(json.loads((folder / "summary.json").read_text()))


# Hangs: /health says 200 all the while.

HANG_S, CANARY_S, CANARY_TIMEOUT_S = 1.5, 1.0, 0.8
HASTY: Mapping[str, Any] = {
    "watch": {
        "interval_s": 0.2,
        "request_timeout_s": 0.5,
        "heartbeat_interval_s": 0.1,
        "hang_timeout_s": HANG_S,
        "first_request_timeout_s": HANG_S,
        "canary_interval_s": CANARY_S,
        "canary_timeout_s": CANARY_TIMEOUT_S,
    }
}
HUNG = {
    "EngineCore, busy": ("VLLM::EngineCore", True, {}),
    "EngineCore, idle": ("VLLM::EngineCore", False, {}),
    "EngineCore, idle, with a heartbeat that moves without requests": ("VLLM::EngineCore", False, {"FAKE_HEARTBEAT": "ghost"}),
    "Worker, busy": ("VLLM::Worker", True, {}),
    "Worker, idle": ("VLLM::Worker", False, {}),
    "API server, busy": ("vllm", True, {}),
    "API server, idle": ("vllm", False, {}),
    "everything, busy": ("", True, {}),
    "everything, idle": ("", False, {}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.soak] if name.startswith("Worker") or name == "everything, idle" else []) for name in HUNG])
def test_a_stopped_process_is_a_hang_within_its_bound(name: str) -> None:
    victim, busy, fake = HUNG[name]
    bound = HANG_S + 2 if busy else CANARY_S + CANARY_TIMEOUT_S + 2
    with quick({"FAKE_TOKEN_S": "0.05", **fake}, HASTY, cgroup=True) as instance, measured(f"SIGSTOP of {name}", bound) as row, contextlib.ExitStack() as stack:
        instance.wait_ready()
        if busy:
            stack.enter_context(contextlib.closing(open_stream(instance, 2000)))
            watch_for(0.5, instance, lambda: instance.daemon and instance.daemon.poll() is None)
        pids = [instance.engine_process(victim).pid] if victim else instance.engine_pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        watch_the_end(instance, row, time.monotonic(), within_s=bound + 10)
        ended(instance, row, 75, "engine_hung")
        folder = max((instance.state / "incidents").iterdir())
        states = {line.split()[0]: line.split()[2] for line in (folder / "processes.txt").read_text().splitlines()[1:]}
        assert {pid for pid, state in states.items() if state == "T"} == set(map(str, pids)), "what hung was to be looked at before it was killed"


def test_a_heartbeat_that_stands_still_under_load_is_a_hang() -> None:
    with quick({"FAKE_TOKEN_S": "0.05", "FAKE_HEARTBEAT": "frozen"}, HASTY, cgroup=True) as instance, measured("frozen heartbeat under load, /health 200", HANG_S + 2) as row:
        instance.wait_ready()
        with contextlib.closing(open_stream(instance, 2000)):
            watch_the_end(instance, row, time.monotonic(), within_s=HANG_S + 10)
            ended(instance, row, 75, "engine_hung")


# What is no fault: nothing ends.

JUMPY: Mapping[str, Any] = {"watch": {**HASTY["watch"], "hang_timeout_s": 0.6, "first_request_timeout_s": 0.6, "canary_interval_s": 0.3}}


@pytest.mark.parametrize("heartbeat", ["live", "ghost", "frozen"])
def test_an_idle_engine_that_answers_its_proofs_of_life_is_left_alone(heartbeat: str) -> None:
    """Whatever its figures do: they move without requests, or never."""
    with quick({"FAKE_HEARTBEAT": heartbeat}, JUMPY, cgroup=True) as instance, measured(f"idle, with a heartbeat that is {heartbeat}") as row:
        instance.wait_ready()
        watch_for(2.0, instance, lambda: instance.daemon and instance.daemon.poll() is None)
        assert instance.status()["state"] == "ready"
        row.said = "no verdict"
        stop(instance)


@pytest.mark.parametrize("kind", ["huge", "garbage", "slow", "500", "hang"])
def test_metrics_that_cannot_be_read_end_nothing_and_cost_little(kind: str) -> None:
    """64 MB of them, nonsense, a byte in a tenth of a second, an error, no answer; with and without a request in flight."""
    with quick({"FAKE_METRICS": kind}, JUMPY, cgroup=True) as instance, measured(f"metrics: {kind}") as row:
        instance.wait_ready()
        before = resident_mib(instance.pid)
        watch_for(1.0, instance, lambda: instance.daemon and instance.daemon.poll() is None)
        with contextlib.closing(open_stream(instance, 2000)):
            watch_for(1.0, instance, lambda: instance.daemon and instance.daemon.poll() is None)
        assert instance.status()["state"] == "ready"
        grown = resident_mib(instance.pid) - before
        row.said = f"nothing ended; {grown:+.1f} MiB"
        assert grown < 16
        stop(instance)


def test_clients_of_the_control_socket_that_never_read_or_write_hold_nobody_up() -> None:
    with quick(cgroup=True, watchdog_s=2) as instance, measured("40 clients of the control socket that never read") as row:
        instance.wait_ready()
        with contextlib.ExitStack() as stack:
            for index in range(40):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                with contextlib.suppress(OSError):
                    client.connect(str(instance.runtime / "control.sock"))
                    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" if index % 2 else b"GET /sta")
            asked = time.monotonic()
            assert instance.ask("/health")[0] == 200
            instance.kill_engine("vllm")
            watch_the_end(instance, row, asked, within_s=5)
        ended(instance, row, 70, "engine_exited")
        assert row.verdict_s is not None
        assert row.verdict_s < SLACK_S


# Processes that do not want to end.


@pytest.mark.soak
def test_sigterm_that_is_ignored_is_a_bounded_stop() -> None:
    """shutdown_timeout + 10 s, then SIGKILL. (In make test, tests/system/test_stop does this under systemd.)"""
    with quick({"FAKE_SIGTERM": "ignore"}, {"stop": {"shutdown_timeout_s": 0}}, cgroup=True) as instance, measured("SIGTERM ignored: the stop", 11.5) as row:
        instance.wait_ready()
        asked = time.monotonic()
        stop(instance)
        row.verdict_s = row.empty_s = time.monotonic() - asked
        assert row.empty_s < 11.5


@pytest.mark.alone
@pytest.mark.parametrize("cgroup", [True, False], ids=["cgroup", "processes"])
def test_two_hundred_processes_that_ignore_everything_are_gone_in_a_second(cgroup: bool) -> None:
    """Double-forked, renamed, in sessions of their own; in a cgroup also without the environment that names the launch."""
    traits = NASTY if cgroup else "setsid,fork,rename,ignore"
    name = f"200 processes that ignore everything, {'a' if cgroup else 'no'} cgroup"
    with quick({"FAKE_CROWD": "200", "FAKE_STRAY": traits}, cgroup=cgroup) as instance, measured(name, SLACK_S) as row:
        instance.wait_ready()
        assert len(instance.engine_pids()) > 200
        instance.kill_engine("vllm")
        watch_the_end(instance, row, time.monotonic(), within_s=10)
        ended(instance, row, 70, "engine_exited")


@pytest.mark.alone
@pytest.mark.parametrize("how", ["verdict", "stop"])
def test_a_fork_bomb_that_has_filled_the_unit_s_limit_ends_whole(how: str) -> None:
    """TasksMax= holds for the supervisor as well: it can start nothing any more, neither to look nor to kill."""
    with contextlib.closing(PidsLimit(300)) as limit, measured(f"a fork bomb at the limit of tasks: {how}", SLACK_S) as row:
        instance = Tampered.quick(fake={"FAKE_BOMB": "10@1"}, before=tuple(limit.enter([])))
        with instance:
            instance.wait_ready()
            procs.wait_until("a full group", limit.is_full)
            fault = time.monotonic()
            if how == "stop":
                stop(instance)
                row.verdict_s = row.empty_s = time.monotonic() - fault
                row.verdict_s = None
                return
            instance.kill_engine("vllm")  # looks at every process: not a part of what is measured
            watch_the_end(instance, row, time.monotonic(), within_s=10)
            ended(instance, row, 70, "engine_exited")


# Output. The floods are in test_daemon_output; these are what a verdict needs of it.


@pytest.mark.parametrize("kind", ["flood", "long", "broken"])
def test_output_at_its_worst_does_not_delay_a_verdict(kind: str) -> None:
    with quick({"FAKE_OUTPUT": kind}, {"watch": {"interval_s": WATCH_S}}, cgroup=True) as instance, measured(f"SIGKILL under output: {kind}", 2.0) as row:
        instance.wait_ready()
        instance.kill_engine("vllm")
        watch_the_end(instance, row, time.monotonic(), within_s=10)
        ended(instance, row, 70, "engine_exited")
        assert_nothing_left(instance)


# Restarts.


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_failures_in_a_row_leave_nothing_that_adds_up(count: int) -> None:
    """Each a life of its own, as systemd would start them: its files, groups, processes, and the tenth incident."""
    with quick({"FAKE_SPEED": "8", "FAKE_STRAY": NASTY}, {"watch": {"keep_incidents": 3}}, cgroup=True) as instance, measured(f"{count} failures and starts in a row") as row:
        sizes: list[tuple[int, int]] = []
        for number in range(count):
            if number:
                instance.start()
            instance.wait_ready()
            instance.kill_engine("vllm")
            assert instance.wait_exit() == 70, instance.describe()
            assert_nothing_left(instance)
            sizes.append(grown(instance))
        assert instance.cgroup is not None
        assert {path.name for path in instance.cgroup.groups()} <= {instance.cgroup.top.name, "vllmd@test.service", "supervisor"}
        assert len(list((instance.state / "incidents").iterdir())) <= 4, "the newest three, and the first of the series"
        settled = sizes[5:]
        row.said = f"files {settled[0][0]} -> {settled[-1][0]}, bytes {settled[0][1]} -> {settled[-1][1]}"
        assert settled[-1][0] == settled[0][0]
        assert settled[-1][1] < settled[0][1] + (256 << 10)


def grown(instance: Instance) -> tuple[int, int]:
    """Files and bytes below its root, but for the test's own logs."""
    files = [path for path in instance.root.rglob("*") if path.is_file() and path.suffix not in (".out", ".err")]
    return len(files), sum(path.stat().st_size for path in files)
