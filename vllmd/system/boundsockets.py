"""Sockets that are bound and not listening, on kernels before 6.8, whose socket tables do not show them.

The last resort, when a bind fails and nothing explains it: take a copy of each socket that the processes we may look
into hold (pidfd_getfd), and ask the copy for its address. Slow, and blind to other users' processes unless root asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator

from vllmd.system import procfs
from vllmd.system.sockdiag import Socket, TcpState

_SYS_PIDFD_GETFD = 438
"""The same number on every architecture."""
_TCP_INFO_STATE_CLOSE = 7


def on_port(port: int) -> list[Socket]:
    """Bound TCP sockets with this port, each once. uid is that of the process that holds it."""
    found: dict[int, Socket] = {}
    for pid in procfs.pids():
        for inode, each in _sockets(pid):
            with contextlib.suppress(OSError), each:
                if inode not in found and _is_bound_to(each, port):
                    uid = procfs.uid(pid)
                    address = each.getsockname()[0].partition("%")[0]
                    found[inode] = Socket(each.family, TcpState.BOUND, address, port, inode, -1 if uid is None else uid)
    return list(found.values())


def _is_bound_to(each: socket.socket, port: int) -> bool:
    if each.family not in (socket.AF_INET, socket.AF_INET6) or each.type != socket.SOCK_STREAM:
        return False
    state = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state == _TCP_INFO_STATE_CLOSE and each.getsockname()[1] == port


def _sockets(pid: int) -> Iterator[tuple[int, socket.socket]]:
    held = procfs.sockets_of(pid)
    if not held:
        return
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            for number, inode in held.items():
                copy = ctypes.CDLL(None).syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
                if copy >= 0:
                    yield inode, socket.socket(fileno=copy)
        finally:
            os.close(pidfd)
