"""What everybody may know of an instance: status.json, control.sock, /metrics; and SIGHUP, which reads the configuration again."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests import procs
from tests.component.daemons import Tampered, assert_nothing_left, ends, quick, stop
from tests.harness import Instance, merged

pytestmark = pytest.mark.component

FIELDS = {
    "schema",
    "instance",
    "state",
    "since",
    "phase",
    "progress",
    "engine",
    "model",
    "endpoint",
    "error",
    "launch_id",
}
GROUP = {"group", "role", "rank"}


@contextlib.contextmanager
def read_all_the_while(instance: Instance) -> Iterator[list[dict[str, Any]]]:
    """Reads status.json as fast as it can; a torn one ends the test."""
    seen: list[dict[str, Any]] = []
    faults: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                seen.append(json.loads((instance.runtime / "status.json").read_text()))
            except FileNotFoundError:
                continue
            except ValueError as error:
                faults.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    assert not faults, faults


def test_status_json_is_whole_at_every_moment() -> None:
    with quick({"FAKE_START_S": "6"}) as instance:
        with read_all_the_while(instance) as seen:
            instance.wait_ready()
            stop(instance)
        assert len(seen) > 100
        assert all(document.keys() >= FIELDS | GROUP and document["schema"] == 1 for document in seen)
        states = list(dict.fromkeys(document["state"] for document in seen))
        assert states[-1] == "stopped"
        assert "starting" in states
        assert "ready" in states
        assert len({document["progress"]["fraction"] for document in seen}) > 5


def test_control_sock_says_what_status_json_says() -> None:
    with quick() as instance:
        instance.wait_ready()
        told = procs.wait_until("both say the same", lambda: said if (said := instance.status()) == instance.status_json() else {})
        assert told["state"] == "ready"
        assert told["instance"] == "demo"
        assert told["endpoint"] == f"http://127.0.0.1:{instance.port}"
        assert told["engine"]["pid"] == instance.engine_process("vllm").pid
        assert told["engine"]["version"] == "0.32.0"
        assert told["model"]["served_name"] == "tiny"
        assert told["model"]["directory"] == str(instance.root / "model-generate")
        assert told["launch_id"] == instance.launch_json()["launch_id"]
        assert instance.control("/nothing")[0] == 404


def test_metrics_are_prometheus_text() -> None:
    with quick() as instance:
        instance.wait_ready()
        code, text = instance.control("/metrics")
        assert code == 200
        assert 'vllmd_ready{name="demo"} 1.0' in text
        assert 'vllmd_state{name="demo",state="ready"} 1.0' in text
        assert 'vllmd_state{name="demo",state="killing"} 0.0' in text
        assert 'vllmd_start_phase_seconds{name="demo",phase="spawn"}' in text
        assert 'vllmd_dropped_total{name="demo",what="engine_lines"} 0.0' in text


def test_a_failure_is_in_status_json_with_code_what_and_hint() -> None:
    with quick({"FAKE_EXIT_READY": "7@3"}) as instance:
        ends(instance, 70, "engine_exited", ready=True)
        error = instance.status_json()["error"]
        assert error["code"] == "engine_exited"
        assert "exit status 7" in error["what"]
        assert error["hint"]
        assert error["status"] == 70


def test_clients_that_never_read_or_write_disturb_nobody() -> None:
    with quick() as instance, contextlib.ExitStack() as stack:
        instance.wait_ready()
        for text in (b"", b"GET /sta", b"\xff\x00garbage\r\n\r\n") * 5:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(instance.runtime / "control.sock"))
            client.sendall(text)
        assert instance.status()["state"] == "ready"
        stop(instance)


# SIGHUP


def reload(instance: Instance, says: str, times: int = 1) -> str:
    """Sends SIGHUP; the log once it says what is expected."""
    instance.write_config()
    instance.signal(signal.SIGHUP)
    procs.wait_until(says, lambda: instance.log().count(says) >= times, 10)
    return instance.log()


def test_a_reload_applies_what_can_be_and_names_what_needs_a_restart() -> None:
    with quick({"FAKE_HEALTH": "503@1"}, {"watch": {"interval_s": 600}}) as instance:
        instance.wait_ready()
        instance.config = merged(
            instance.config,
            {"watch": {"interval_s": 0.1}, "serve": {"max_model_len": 512}, "stop": {"kill_timeout_s": 5}},
        )
        log = reload(instance, "needs a restart: ")
        assert "applied: watch.interval_s" in log
        waiting = ["serve.max_model_len", "stop.kill_timeout_s"]
        procs.wait_until("status.json", lambda: instance.status_json()["needs_restart"] == waiting)
        assert instance.status()["state"] == "ready"


def test_a_shorter_interval_of_the_watch_applies_at_once() -> None:
    with quick({"FAKE_HEALTH": "503@2"}, {"watch": {"interval_s": 60}}) as instance:
        instance.wait_ready()
        instance.config = merged(instance.config, {"watch": {"interval_s": 0.1}})
        reload(instance, "applied: watch.interval_s")
        ends(instance, 70, "engine_unhealthy", ready=True)


def test_a_broken_configuration_is_said_and_not_taken_over() -> None:
    with quick() as instance:
        instance.wait_ready()
        (instance.root / "etc/demo.yaml").write_text("watch: {intervall_s: 1}\n")
        instance.signal(signal.SIGHUP)
        procs.wait_until("the complaint", lambda: "not taken over" in instance.log())
        assert "did you mean" in instance.log()
        assert instance.status()["state"] == "ready"
        assert instance.ask("/health")[0] == 200
        instance.config = merged(instance.config, {"watch": {"failures": 7}})
        reload(instance, "applied: watch.failures")
        stop(instance)


def test_a_reload_keeps_what_the_command_line_said() -> None:
    with quick() as instance:
        instance.wait_ready()
        stop(instance)
        instance.start("--set", "watch.failures=9", "--set", "stop.kill_timeout_s=7")
        instance.wait_ready()
        assert "nothing changed" in reload(instance, "configuration read again")
        assert instance.status()["needs_restart"] == []


def test_the_log_level_and_the_rate_of_lines_apply_at_once() -> None:
    with quick({"FAKE_OUTPUT": "broken"}, {"log": {"lines_per_s": 100000}}) as instance:
        instance.wait_ready()
        instance.config = merged(instance.config, {"log": {"lines_per_s": 1, "level": "warning"}})
        instance.write_config()
        instance.signal(signal.SIGHUP)
        procs.wait_until("dropped lines", lambda: "it logs too fast" in instance.log(), 20)
        instance.signal(signal.SIGHUP)
        stop(instance)
        assert "nothing is left" not in instance.log(), "an INFO, below the new level"


def test_a_storm_of_reloads_in_every_stage_ends_nothing() -> None:
    """It fills the loop's wake-up socket, about which CPython would complain, and deadlock."""
    with quick({"FAKE_START_S": "0.5"}) as instance:
        procs.wait_until("the loop has begun", lambda: (instance.runtime / "control.sock").exists())
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            instance.signal(signal.SIGHUP)
        instance.wait_ready()
        stop(instance)
        assert "configuration read again" in instance.log()
        assert "Traceback" not in instance.log()


# unconfigured


def test_no_model_selected_is_ready_without_an_engine() -> None:
    with quick() as instance:
        instance.wait_ready()
        stop(instance)
        instance.config = {name: value for name, value in instance.config.items() if name != "model"}
        instance.write_config()
        instance.start()
        status = instance.wait_ready().get("STATUS")
        assert status.startswith(f"No model selected. Run: vllmctl --root {instance.root} model set demo ")
        assert instance.status()["state"] == "unconfigured"
        assert instance.engine() == []
        assert not (instance.state / "launch.json").exists()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", instance.port))
        instance.config = {**instance.config, "model": {"path": str(instance.root / "model-generate")}}
        assert "needs a restart: model.path" in reload(instance, "needs a restart")
        stop(instance)


def test_a_bug_of_ours_is_status_70_with_its_traceback_and_no_leftovers() -> None:
    patch = "from vllmd.instance import engine_life\ndef broken(*a, **k):\n    raise ZeroDivisionError('once')\nengine_life.prove = broken\n"
    with Tampered.quick(patch) as instance:
        error = ends(instance, 70, "internal_error", ready=False)
        assert "ZeroDivisionError" in error["what"]
        assert "Traceback" in instance.log()
        assert_nothing_left(instance)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_moment_changes_no_exit_status(number: signal.Signals) -> None:
    """systemd takes a death by one of these for a clean end, and would not restart what has failed."""
    late = f"""
import asyncio, os
real = asyncio.run
def run(work):
    status = real(work)
    os.kill(os.getpid(), {int(number)})
    return status
asyncio.run = run
"""
    with Tampered.quick(late, fake={"FAKE_EXIT_READY": "1@3"}) as instance:
        ends(instance, 70, "engine_exited", ready=True)
