"""The network of a container, for servers of a test: their sockets are inside, the rest of them is in the test's process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.container import Container

_CLONE_NEWNET = 0x40000000


@contextmanager
def network_of(container: Container) -> Iterator[None]:
    """Sockets that this thread makes here are the container's, and stay it; threads that begin here are in its network too."""
    with Path("/proc/thread-self/ns/net").open("rb") as ours, Path(f"/proc/{container.init}/ns/net").open("rb") as theirs:
        _enter(theirs.fileno())
        try:
            yield
        finally:
            _enter(ours.fileno())


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
