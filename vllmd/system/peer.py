"""Who is at the other end of a unix socket, told by the kernel: nobody can claim to be another."""

from __future__ import annotations

import array
import contextlib
import grp
import os
import socket
import struct
from dataclasses import dataclass

SO_PEERGROUPS = 59
_BUFFER = 1024
"""The longest that Python asks for: 256 groups. Who is in more counts by the main one alone."""
ADMINS = "vllmd-admin"
"""Members may pause and resume instances (units/sysusers.d)."""


@dataclass(frozen=True, slots=True)
class Peer:
    pid: int
    uid: int
    gids: frozenset[int]

    def is_allowed(self, admins: int) -> bool:
        """To change something: root, our own user, and the administrators' group (its number, -1 where there is none)."""
        return self.uid in (0, os.geteuid()) or admins in self.gids

    def __str__(self) -> str:
        return f"uid {self.uid}"


def group_id(name: str) -> int:
    """-1 where there is no such group. Blocks where the user database does."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return -1


def peer_of(link: socket.socket) -> Peer:
    """As it was when the other side connected. OSError on a socket that is none of the unix kind."""
    pid, uid, gid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    more = array.array("I")
    with contextlib.suppress(OSError):
        more.frombytes(link.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _BUFFER))
    return Peer(pid, uid, frozenset({gid, *more}))
