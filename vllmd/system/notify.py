"""systemd's notify protocol: READY, STATUS, WATCHDOG, EXTEND_TIMEOUT and their like, over a socket that may never block us.

A datagram that the socket does not take is counted and not raised: a full socket must not end a serving instance. What
systemd cannot do without (READY, STOPPING, RELOADING) is owed and goes out in front of the next datagram; the watchdog's
ping is the latest occasion. MAINPID is never sent: we are the main process.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

_OWED = ("READY", "STOPPING", "RELOADING", "MONOTONIC_USEC")
_LINE_MAX = 2048


class NullNotifier:
    """Nobody listens: run by hand, or in a container. Says nothing and never fails."""

    watchdog_s: float = 0.0
    """Interval within which WATCHDOG=1 is expected, in seconds; 0 when systemd does not watch."""
    lost: int = 0
    """Datagrams that the socket did not take."""

    def send(self, **fields: str) -> bool:
        """True when systemd has it (nothing to do counts as that)."""
        del fields
        return True

    def ready(self, status: str) -> bool:
        return self.send(READY="1", STATUS=status)

    def status(self, text: str) -> bool:
        return self.send(STATUS=text)

    def stopping(self, status: str) -> bool:
        """Also disarms systemd's watchdog: to be sent at once on every verdict."""
        return self.send(STOPPING="1", STATUS=status)

    def extend(self, seconds: float) -> bool:
        """The running start or stop may take this much longer, from now."""
        return self.send(EXTEND_TIMEOUT_USEC=str(max(1, int(seconds * 1e6))))

    def watchdog(self) -> bool:
        return self.send(WATCHDOG="1")

    def reloading(self) -> bool:
        """Followed by ready() when the new configuration is in force; the time stamp is what Type=notify-reload wants."""
        return self.send(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))

    def close(self) -> None:
        """Idempotent."""


class Notifier(NullNotifier):
    """Speaks to NOTIFY_SOCKET, a path or an abstract name (@...)."""

    def __init__(self, address: str, watchdog_s: float = 0.0) -> None:
        self.watchdog_s = watchdog_s
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._owed: dict[str, str] = {}

    @staticmethod
    def from_environ(environ: Mapping[str, str]) -> NullNotifier:
        """A Notifier, or the NullNotifier where the environment names no socket we can speak to."""
        address = environ.get("NOTIFY_SOCKET", "")
        if len(address) < 2 or address[0] not in "/@":
            return NullNotifier()
        return Notifier(address, watchdog_interval_s(environ))

    def send(self, **fields: str) -> bool:
        message = self._owed | fields
        try:
            self._socket.sendto(_encode(message), self._address)
        except (OSError, ValueError):  # full, vanished, or a name the kernel does not take
            self.lost += 1
            self._owed = {name: value for name, value in message.items() if name in _OWED}
            return False
        self._owed = {}
        return True

    def close(self) -> None:
        self._socket.close()


def watchdog_interval_s(environ: Mapping[str, str]) -> float:
    """WATCHDOG_USEC in seconds; 0 when it is absent, nonsense, or meant for another process (WATCHDOG_PID)."""
    meant_for = environ.get("WATCHDOG_PID", "")
    if meant_for and meant_for != str(os.getpid()):
        return 0.0
    text = environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isascii() and text.isdigit() else 0.0


def _encode(fields: Mapping[str, str]) -> bytes:
    """One NAME=value per line; a line break in a value would forge a field."""
    lines = (f"{name}={' '.join(value.splitlines())[:_LINE_MAX]}" for name, value in fields.items())
    return "\n".join(lines).encode(errors="replace")
