"""Whether somebody answers where an instance says so, without asking systemd: for health checks, and where no systemd runs it."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from vllmd.config.paths import Paths
from vllmd.system.unixpath import opened

TIMEOUT_S = 1.0
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def has_supervisor(paths: Paths, name: str) -> bool | None:
    """Nothing but a supervisor listens on control.sock; None where we may not find out."""
    return listens(paths.instance_runtime(name) / "control.sock")


def serves(endpoint: str) -> bool | None:
    """Whether somebody listens at an endpoint as status.json has it. None: nobody can say (a full backlog is busy, not dead)."""
    if endpoint.startswith("unix:/"):
        return listens(Path(endpoint.removeprefix("unix:")))
    host, _, port = endpoint.partition("://")[2].rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    host = _LOOPBACK.get(host, host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError, ValueError, OverflowError), socket.socket(family) as link:
        socket.inet_pton(family, host)  # an address: a name would wait for a resolver
        link.settimeout(TIMEOUT_S)
        try:
            link.connect((host, int(port)))
        except ConnectionRefusedError:
            return False
        return True
    return None


def listens(path: Path) -> bool | None:
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as link:  # ValueError: a path with a NUL
        link.settimeout(TIMEOUT_S)
        try:
            with opened(path) as address:
                link.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True
    return None
