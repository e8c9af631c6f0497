"""The notify protocol against a real datagram socket that, as systemd's, asks for the sender's credentials."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllmd.system.notify import Notifier, NullNotifier

pytestmark = pytest.mark.component


class Manager:
    """systemd's end."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(address)

    def receive(self) -> tuple[int, dict[str, str]]:
        data, control, _, _ = self.socket.recvmsg(8192, 1024)
        pid = next(struct.unpack("3i", value)[0] for _, kind, value in control if kind == socket.SCM_CREDENTIALS)
        return pid, dict(line.split("=", 1) for line in data.decode().split("\n"))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notify")


@pytest.fixture
def manager(path: str) -> Iterator[Manager]:
    manager = Manager(path)
    yield manager
    manager.socket.close()


@pytest.fixture
def notifier(path: str, manager: Manager) -> Iterator[NullNotifier]:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": path})
    yield notifier
    notifier.close()


def test_every_message_arrives_with_our_pid(manager: Manager, notifier: NullNotifier) -> None:
    assert notifier.ready("serving qwen3")
    assert manager.receive() == (os.getpid(), {"READY": "1", "STATUS": "serving qwen3"})
    notifier.status("loading 40 %")
    assert manager.receive()[1] == {"STATUS": "loading 40 %"}
    notifier.extend(1.5)
    assert manager.receive()[1] == {"EXTEND_TIMEOUT_USEC": "1500000"}
    notifier.watchdog()
    assert manager.receive()[1] == {"WATCHDOG": "1"}
    notifier.reloading()
    fields = manager.receive()[1]
    assert fields["RELOADING"] == "1"
    assert int(fields["MONOTONIC_USEC"]) > 0
    notifier.stopping("bye")
    assert manager.receive()[1] == {"STOPPING": "1", "STATUS": "bye"}


def test_a_line_break_in_a_status_forges_no_field(manager: Manager, notifier: NullNotifier) -> None:
    notifier.status("error\nREADY=1")
    assert manager.receive()[1] == {"STATUS": "error READY=1"}


def test_abstract_socket() -> None:
    name = f"vllmd-test-{os.getpid()}"
    manager = Manager("\0" + name)
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": "@" + name})
    try:
        assert notifier.ready("x")
        assert manager.receive()[1]["READY"] == "1"
    finally:
        notifier.close()
        manager.socket.close()


def test_a_full_socket_never_blocks_and_ready_is_not_lost(manager: Manager, notifier: NullNotifier) -> None:
    while notifier.status("x"):
        pass
    assert not notifier.ready("serving")
    assert notifier.lost == 2
    for _ in range(100_000):
        try:
            manager.receive()
        except BlockingIOError:
            break
    assert notifier.watchdog()
    assert manager.receive()[1] == {"READY": "1", "WATCHDOG": "1"}
    notifier.watchdog()
    assert manager.receive()[1] == {"WATCHDOG": "1"}


def test_a_vanished_socket_never_raises(manager: Manager, notifier: NullNotifier, path: str) -> None:
    Path(path).unlink()
    assert not notifier.ready("x")
    manager.socket.close()
    assert not notifier.stopping("x")
    assert notifier.lost == 2


@pytest.mark.parametrize("address", ["", "x", "/", "vsock:2:1234", "relative/path"])
def test_without_a_socket_everything_is_a_null_object(address: str) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": address})
    assert notifier.ready("x")
    assert notifier.watchdog_s == 0.0
    notifier.close()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_watchdog_interval_is_for_the_process_it_names(environ: dict[str, str], expected: float, path: str) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": path, **environ})
    assert notifier.watchdog_s == expected
    notifier.close()
