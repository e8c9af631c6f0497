"""Whose port it is: READY only by a listener of ours, and nobody else's server is ever touched."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests import procs
from tests.component.daemons import QUICK, Tampered, assert_nothing_left, ends, quick, stop
from tests.harness import FAKE, Instance

pytestmark = pytest.mark.component


@contextlib.contextmanager
def another_engine(instance: Instance, *arguments: str, start_s: str = "0.1") -> Iterator[subprocess.Popen[bytes]]:
    """A vLLM that somebody started by hand, on the instance's port."""
    argv = [str(FAKE), "serve", str(instance.root / "model-generate"), "--host", "127.0.0.1", *arguments]
    env = {"PATH": os.environ["PATH"], "FAKE_START_S": start_s, "TMPDIR": str(instance.root)}
    sink = subprocess.DEVNULL
    with subprocess.Popen(argv, env=env, stdout=sink, stderr=sink, start_new_session=True) as child:
        try:
            yield child
        finally:
            procs.kill_all({process.pid for process in procs.in_session(child.pid)})


def is_listening(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_a_port_that_somebody_listens_on_is_status_2_and_he_is_untouched() -> None:
    instance = quick()
    with another_engine(instance, "--port", str(instance.port)) as other:
        procs.wait_until("the other engine", lambda: is_listening(instance.port), 30)
        with instance:
            assert instance.wait_exit() == 2
            assert instance.last_json()["error"]["status"] == 2
            assert str(instance.port) in instance.last_json()["error"]["what"]
            assert_nothing_left(instance)
        assert other.poll() is None
        assert is_listening(instance.port)


def test_an_engine_that_takes_the_port_while_ours_loads_is_not_taken_for_ours() -> None:
    """Both bind, the first to listen wins, and the other says 'startup complete' and never serves (FACTS: two vLLMs)."""
    instance = quick({"FAKE_START_S": "4"})
    with instance:
        instance.wait_state("starting")
        procs.wait_until("our own engine has bound", lambda: "non-default args" in instance.log(), 30)
        with another_engine(instance, "--port", str(instance.port)) as other:
            error = ends(instance, 2, "port_answered_by_other", ready=False)
            assert "not by our engine" in error["what"]
            assert other.poll() is None
            assert is_listening(instance.port)


class Impostor(BaseHTTPRequestHandler):
    """Answers 200 to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


@contextlib.contextmanager
def impostor(port: int) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", port), Impostor)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_port_that_somebody_else_answers_is_no_ready() -> None:
    """Our engine never binds, and something answers in its place."""
    with quick({"FAKE_BIND": "never", "FAKE_START_S": "30"}) as instance:
        instance.wait_state("starting")
        with impostor(instance.port):
            error = ends(instance, 2, "port_answered_by_other", ready=False)
            assert "not by our engine" in error["what"]


def test_two_instances_on_one_port_do_not_kill_each_other() -> None:
    with quick() as one:
        one.wait_ready()
        config = {"serve": {"port": one.port}}
        with quick(config=config, name="other", root=one.root) as other:
            assert other.wait_exit() == 2
        assert one.status()["state"] == "ready"
        stop(one)


def test_the_lock_of_the_port_keeps_a_second_start_out() -> None:
    """Held from before the spawn until our engine listens: what both would bind, only one may start."""
    with quick({"FAKE_START_S": "3"}) as one:
        one.wait_state("starting")
        with quick(config={"serve": {"port": one.port}}, name="other", root=one.root) as other:
            assert other.wait_exit() == 75
            assert "lock" in other.last_json()["error"]["code"]
        one.wait_ready()
        stop(one)


def test_a_second_supervisor_of_an_instance_ends_with_75_and_changes_nothing() -> None:
    with quick() as one:
        one.wait_ready()
        second = subprocess.run(
            one.command("run", one.name),
            env={**one.env, "NOTIFY_SOCKET": ""},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert second.returncode == 75
        assert f"supervised already, by pid {one.pid}" in second.stderr
        assert not (one.state / "last.json").exists(), "the reason is the running supervisor's to write"
        assert one.status()["state"] == "ready"
        assert one.ask("/health")[0] == 200
        stop(one)
        assert one.last_json()["status"] == 0


def serving_on_a_socket() -> Instance:
    return quick(config={"serve": {"listen": "uds"}})


def test_a_unix_socket_is_served_and_is_gone_afterwards() -> None:
    with serving_on_a_socket() as instance:
        assert instance.wait_ready().get("STATUS").endswith(f"unix:{instance.root}/run/sock/demo.sock")
        assert instance.ask("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 1})[0] == 200
        stop(instance)


def test_a_stale_unix_socket_does_not_keep_a_start_from_succeeding() -> None:
    """vLLM leaves the file behind, and fails on one that it finds."""
    with serving_on_a_socket() as instance:
        instance.wait_ready()
        instance.signal(9)
        instance.wait_exit()
        assert (instance.root / "run/sock/demo.sock").exists()
        instance.start()
        instance.wait_ready()
        stop(instance)


class Deep(Tampered):
    """Its root is given by a path of some 200 bytes: sun_path has 107."""

    def command(self, *arguments: str) -> list[str]:
        path = self.root / ("d" * 90) / ("e" * 90)
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.symlink_to(self.root)
        argv = super().command(*arguments)
        argv[argv.index("--root") + 1] = str(path)
        return argv


def test_a_long_root_has_its_control_socket() -> None:
    with Deep(fake={"FAKE_START_S": "0.1"}, config=QUICK) as instance:
        instance.wait_ready()
        assert instance.status()["state"] == "ready"
        stop(instance)


def test_a_long_root_refuses_a_socket_that_the_engine_could_not_bind() -> None:
    with Deep(config={**QUICK, "serve": {"listen": "uds"}}) as instance:
        error = ends(instance, 78, "socket_path_too_long", ready=False)
        assert "Warning" not in instance.log()
        document = instance.status_json()  # no reader may go on waiting for a start that never was
        assert (document["state"], document["error"]) == ("stopped", error)


def test_an_address_that_this_machine_does_not_have_is_named() -> None:
    """75: at boot it may come a moment later."""
    with quick(config={"serve": {"host": "192.0.2.1"}}) as instance:
        assert "192.0.2.1" in ends(instance, 75, "address_unavailable", ready=False)["what"]
