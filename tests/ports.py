"""Free TCP ports for tests: below the kernel's ephemeral range, and never given out twice, also between test runs side by side."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import socket
import tempfile
from pathlib import Path

LOWEST, HIGHEST = 20000, 32000
"""Outgoing connections take theirs from 32768 on, so that none can snatch a port before the engine binds it."""


def free_port() -> int:
    """A port that nobody has bound on any address, reserved for this process until it ends."""
    folder = Path(tempfile.gettempdir()) / f"vllmd-test-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for _ in range(1000):
        port = random.randrange(LOWEST, HIGHEST)
        if _is_free(port) and _reserve(folder / str(port)):
            return port
    raise RuntimeError(f"no free port between {LOWEST} and {HIGHEST}")


def _is_free(port: int) -> bool:
    """An exclusive bind also sees sockets that are bound and do not listen."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family) as sock:
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((address, port))
        except OSError as error:
            if error.errno != 97:  # EAFNOSUPPORT: a host without IPv6
                return False
    return True


def _reserve(mark: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        if not Path(f"/proc/{int(mark.read_text())}").exists():
            mark.unlink(missing_ok=True)
    try:
        with mark.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    atexit.register(mark.unlink, missing_ok=True)
    return True
