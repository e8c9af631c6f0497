"""Where the figures of a running instance go: an address, a unix socket, a textfile; and that none of it ends an instance."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import procs, promtool
from tests.component.daemons import ends, quick, stop
from tests.component.gpu_hosts import GpuHost, uuid
from tests.component.test_daemon_status import reload
from tests.engine.server import UnixConnection
from tests.harness import Instance, merged
from tests.ports import free_port
from tests.unit.expositions import names
from tests.unit.test_monitoring import asked
from vllmd.instance.metric_rows import METRICS

pytestmark = pytest.mark.component


def ask(where: int | Path, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", where, timeout=5) if isinstance(where, int) else UnixConnection(str(where), 5)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def listening(port: int) -> dict[str, Any]:
    return {"metrics": {"listen": f"127.0.0.1:{port}"}}


def test_the_exposition_of_a_running_instance_is_clean() -> None:
    with quick() as instance:
        instance.wait_ready()
        checked = promtool.run("check", "metrics", stdin=instance.control("/metrics")[1])
        assert (checked.returncode, checked.stdout) == (0, "")


def test_the_port_that_is_served_on_is_refused_before_anything_starts() -> None:
    with quick() as instance:
        instance.wait_ready()
        stop(instance)
        instance.config = merged(instance.config, listening(instance.port))
        instance.write_config()
        instance.start()
        assert instance.wait_exit() == 78
        assert f"metrics.listen and serve.port both have port {instance.port}" in instance.log()
        assert "Give metrics.listen another port." in instance.log()


NOT_ALWAYS = ("vllmd_gpu_", "vllmd_transfer_", "vllmd_failures_total", "vllmd_last_failure_time_seconds")
"""Of a watch over GPUs, of a model on its way, of a failure."""


def test_a_running_instance_tells_what_alerts_and_dashboard_ask_for() -> None:
    with quick() as instance:
        instance.wait_ready()
        wanted = {name for name in asked() if name.startswith("vllmd_") and not name.startswith(NOT_ALWAYS)}
        assert len(wanted) > 10
        procs.wait_until("all of them", lambda: wanted <= set(names(instance.control("/metrics")[1])), 10)
        told = names(instance.control("/metrics")[1])
        assert {name: told[name] for name in wanted} == {name: {"name", *METRICS[name].labels} for name in wanted}
        stop(instance)


def test_an_address_answers_for_metrics_and_nothing_else() -> None:
    port = free_port()
    with quick(config=listening(port)) as instance:
        instance.wait_ready()
        code, text = ask(port)
        assert (code, 'vllmd_ready{name="demo"} 1.0' in text) == (200, True)
        assert 'vllmd_state{name="demo",state="ready"} 1.0' in text
        assert "vllmd_start_duration_seconds{" in text
        assert ask(port, "/status")[0] == 404
        assert ask(port, method="POST")[0] == 405
        stop(instance)
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", port)) != 0


def test_metrics_are_there_while_it_starts() -> None:
    port = free_port()
    with quick({"FAKE_START_S": "30"}, listening(port)) as instance:
        instance.wait_state("starting")
        text = ask(port)[1]
        assert 'vllmd_ready{name="demo"} 0.0' in text
        assert "vllmd_start_phase_seconds{" in text
        assert "vllmd_start_duration_seconds{" not in text


def test_a_port_that_is_taken_is_said_and_ends_nothing_and_is_taken_when_it_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with quick(config=listening(port)) as instance:
            instance.wait_ready()
            assert f"cannot serve metrics at 127.0.0.1:{port}: Address already in use" in instance.log()
            assert "set metrics.listen to another address" in instance.log()
            assert instance.control("/metrics")[0] == 200
            holder.close()
            other = free_port()
            instance.config = merged(instance.config, listening(other))
            reload(instance, "applied: metrics.listen")
            procs.wait_until("the other port", lambda: instance_answers(other), 10)
            assert instance.status()["state"] == "ready"
            stop(instance)


def instance_answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return ask(port)[0] == 200
    return False


def test_a_unix_socket_answers_and_is_removed_at_the_end() -> None:
    with quick() as instance:
        instance.wait_ready()
        path = instance.root / "metrics.sock"
        instance.config = merged(instance.config, {"metrics": {"listen": str(path)}})
        reload(instance, "applied: metrics.listen")
        procs.wait_until("the socket", path.exists, 10)
        assert "vllmd_ready{" in ask(path)[1]
        stop(instance)
        assert not path.exists()


def test_a_reload_takes_the_listener_away() -> None:
    port = free_port()
    with quick(config=listening(port)) as instance:
        instance.wait_ready()
        assert instance_answers(port)
        instance.config = merged(instance.config, {"metrics": {"listen": ""}})
        reload(instance, "applied: metrics.listen")
        procs.wait_until("nobody listens", lambda: not instance_answers(port), 10)
        assert instance.status()["needs_restart"] == []
        stop(instance)


def textfile(directory: Path) -> dict[str, Any]:
    return {"metrics": {"textfile": str(directory), "interval_s": 0.1}}


def test_a_textfile_is_whole_at_every_moment_and_gone_at_the_end(tmp_path: Path) -> None:
    directory = tmp_path / "made"
    path = directory / "vllmd-demo.prom"
    with quick(config=textfile(directory)) as instance:
        procs.wait_until("the file", path.exists, 10)
        read: set[str] = set()
        over = threading.Event()

        def look() -> None:
            while not over.is_set():
                read.add(path.read_text())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            instance.wait_ready()
            procs.wait_until("ready in the file", lambda: 'vllmd_ready{name="demo"} 1.0' in path.read_text(), 10)
        finally:
            over.set()
            thread.join()
        assert len(read) > 1
        assert all(text.startswith("# HELP vllmd_info ") and "\nvllmd_private_memory_bytes{" in text and text.endswith("\n") for text in read)
        assert path.stat().st_mode & 0o777 == 0o644
        stop(instance)
        assert list(directory.iterdir()) == []


def test_a_textfile_is_removed_also_after_a_failure(tmp_path: Path) -> None:
    with quick({"FAKE_EXIT_READY": "7@3"}, textfile(tmp_path)) as instance:
        procs.wait_until("the file", (tmp_path / "vllmd-demo.prom").exists, 10)
        ends(instance, 70, "engine_exited", ready=True)
        assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with quick(config=textfile(tmp_path / "file/sub")) as instance:
        instance.wait_ready()
        complaint = f"cannot write metrics to {tmp_path}/file/sub/vllmd-demo.prom: Not a directory"
        procs.wait_until("the complaint", lambda: complaint in instance.log(), 10)
        (tmp_path / "file").unlink()
        (tmp_path / "file").mkdir()
        procs.wait_until("the file", (tmp_path / "file/sub/vllmd-demo.prom").exists, 10)
        assert instance.log().count(complaint) == 1
        procs.wait_until("that it is over", lambda: "metrics are written to" in instance.log(), 10)
        stop(instance)


def counted(instance: Instance, metric: str) -> list[str]:
    return [line for line in instance.control("/metrics")[1].splitlines() if line.startswith(metric)]


def test_failures_are_counted_over_lives() -> None:
    with quick({"FAKE_EXIT_READY": "7@3"}) as instance:
        ends(instance, 70, "engine_exited", ready=True)
        instance.config["engine"]["env"].pop("FAKE_EXIT_READY")
        instance.write_config()
        instance.start()
        instance.wait_ready()
        assert counted(instance, "vllmd_failures_total") == ['vllmd_failures_total{cause="engine_exited",name="demo"} 1.0']
        assert counted(instance, "vllmd_last_failure_time_seconds{cause=")
        stop(instance)


def test_causes_that_are_nonsense_keep_no_metric_away() -> None:
    with quick() as instance:
        instance.wait_ready()
        stop(instance)
        last = [{"at": "never", "code": "a", "fingerprint": "", "incident": ""}, 7]
        (instance.state / "causes.json").write_text(json.dumps({"schema": 1, "restarts": {"a": -5, "b": "x", 'q"\n': 2}, "last": last}))
        instance.start()
        instance.wait_ready()
        assert 'vllmd_failures_total{cause="a",name="demo"} 0.0' in counted(instance, "vllmd_failures_total")
        assert promtool.run("check", "metrics", stdin=instance.control("/metrics")[1]).stdout == ""
        stop(instance)


def test_the_gpus_of_the_host_are_shown_as_the_driver_tells_them() -> None:
    """The real binding and our sampler above the stub of the driver's library."""
    with GpuHost(2) as host, host.instance(config={"gpus": [0]}) as instance:
        instance.wait_ready()
        host.stub.gpu(0, clocks="64", temperature="91")
        procs.wait_until("a snapshot", lambda: counted(instance, "vllmd_gpu_clock_limited"), 30)
        text = instance.control("/metrics")[1]
        missing = {name for name in METRICS if name.startswith("vllmd_gpu_")} - set(names(text))
        assert missing == {"vllmd_gpu_retired_pages_total"}, "what an H100 has not"
        assert f'vllmd_gpu_temperature_celsius{{gpu="{uuid(0)}",name="demo"}} 91.0' in text
        assert f'vllmd_gpu_clock_limited{{gpu="{uuid(0)}",name="demo",reason="hardware_thermal"}} 1.0' in text
        assert [f'vllmd_gpu_owned{{gpu="{uuid(index)}",name="demo"}} {owned}' in text for index, owned in ((0, 1.0), (1, 0.0))] == [True, True]
        assert f'vllmd_gpu_memory_size_bytes{{gpu="{uuid(1)}",name="demo"}}' in text
        assert promtool.run("check", "metrics", stdin=text).stdout == ""
        stop(instance)
