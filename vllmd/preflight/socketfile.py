"""A unix socket where an engine is to answer: absent, stale, alive, or something that is not ours to touch.

vLLM does not remove its socket file at exit, and dies after 12 s when it finds one: `vllmd run` removes a stale one of
its own path. Whether it is stale, only a connection tells.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllmd.preflight.report import Listener
from vllmd.system import cgroupnames, procfs

State = Literal["absent", "stale", "live", "refused"]
_CONNECT_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class SocketFile:
    """`refused` says in `reason` why nobody should touch it (a symlink, no socket). A live one has its listener."""

    path: str
    state: State
    reason: str = ""
    listener: Listener | None = None
    inode: int = 0


def inspect(path: str) -> SocketFile:
    """What is there now. Never follows a symlink, in its last part, and changes nothing."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return SocketFile(path, "absent")
    except OSError as error:
        return SocketFile(path, "refused", f"cannot be looked at: {error.strerror}")
    if stat.S_ISLNK(found.st_mode):
        return SocketFile(path, "refused", "is a symbolic link")
    if not stat.S_ISSOCK(found.st_mode):
        return SocketFile(path, "refused", "is there and is not a socket")
    return _ask(path, found.st_ino)


def _ask(path: str, inode: int) -> SocketFile:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
            client.settimeout(_CONNECT_TIMEOUT_S)
            connect(client, path)
            pid, uid, _ = struct.unpack("iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except OSError as error:
        return _unanswered(path, inode, error)
    cgroup = procfs.cgroup(pid)
    pids = (pid,) if pid > 0 else ()
    owner = Listener(path, 0, inode, uid, pids, cgroup, cgroupnames.unit_of(cgroup))
    return SocketFile(path, "live", listener=owner, inode=inode)


def _unanswered(path: str, inode: int, error: OSError) -> SocketFile:
    if error.errno == errno.ECONNREFUSED:
        return SocketFile(path, "stale", inode=inode)
    if error.errno == errno.ENOENT:
        return SocketFile(path, "absent")
    if error.errno == errno.EAGAIN or isinstance(error, TimeoutError):  # its queue is full: somebody listens
        return SocketFile(path, "live", listener=Listener(path, 0, inode), inode=inode)
    return SocketFile(path, "refused", f"cannot be connected to: {error.strerror}")


def connect(client: socket.socket, path: str) -> None:
    """connect(2) through the directory's descriptor: sun_path has 107 bytes, and a root directory may be long."""
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: PTH120
    try:
        client.connect(f"/proc/self/fd/{folder}/{Path(path).name}")
    finally:
        os.close(folder)


def remove_stale(found: SocketFile) -> bool:
    """Remove the very file that was found stale; False when another has taken its place meanwhile. OSError on failure."""
    now = inspect(found.path)
    if found.state != "stale" or now.state != "stale" or now.inode != found.inode:
        return False
    Path(found.path).unlink()
    return True
