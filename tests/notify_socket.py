"""The other end of NOTIFY_SOCKET: remembers every message with its time and sender, and closes what comes with BARRIER=1."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

UCRED = struct.Struct("3i")


@dataclass(frozen=True)
class Message:
    """One datagram. `at` is time.monotonic() of its arrival, `pid` its sender as the kernel says."""

    at: float
    pid: int
    fields: Mapping[str, str]

    def get(self, name: str) -> str:
        return self.fields.get(name, "")


class NotifySocket:
    """Read by a thread at all times: a full socket would block or starve the sender."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[Message] = []
        self._changed = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._thread = threading.Thread(target=self._read, name=f"notify {path}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(65536, 1024)
            if not data:
                return
            fields = dict(line.split("=", 1) for line in data.decode(errors="replace").splitlines() if "=" in line)
            with self._changed:
                self.messages.append(Message(time.monotonic(), _open_ancillary(ancillary), fields))
                self._changed.notify_all()

    def wait(self, predicate: Callable[[Message], bool], timeout_s: float, is_over: Callable[[], bool]) -> Message | None:
        """None when the time is up, or when nothing more can come."""
        deadline = time.monotonic() + timeout_s
        while True:
            over = is_over()  # before looking: what was sent just before the end still counts
            with self._changed:
                for message in self.messages:
                    if predicate(message):
                        return message
                if over or time.monotonic() > deadline:
                    return None
                self._changed.wait(0.02)

    def told(self, name: str) -> list[str]:
        """Every value of a field, in order."""
        return [message.fields[name] for message in self.messages if name in message.fields]

    def forget(self) -> None:
        with self._changed:
            self.messages.clear()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", str(self.path))
        self._thread.join(5)
        self._socket.close()
        self.path.unlink(missing_ok=True)


def _open_ancillary(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The sender's pid. Descriptors are closed at once: that is the answer to BARRIER=1."""
    pid = 0
    for _, kind, data in ancillary:
        if kind == socket.SCM_CREDENTIALS:
            pid = UCRED.unpack(data[: UCRED.size])[0]
        if kind == socket.SCM_RIGHTS:
            for fd in array.array("i", data[: len(data) - len(data) % 4]):
                with contextlib.suppress(OSError):
                    os.close(fd)
    return pid
