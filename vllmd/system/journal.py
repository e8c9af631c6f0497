"""The journal, in its native datagram protocol, without ever blocking.

With journald stopped `journal.send` of the usual bindings blocks after some 500 messages, and the daemon with it. Here
what the socket does not take waits in a bounded outbox, flushed when the loop says that the socket takes more; what the
outbox cannot hold is counted, and reported in one entry when the journal is back.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

from vllmd.system.messages import message_id
from vllmd.system.outbox import Outbox
from vllmd.system.sink import Outcome, Sink
from vllmd.system.terminal import Stderr

SOCKET = Path("/run/systemd/journal/socket")
_FIELD = re.compile("[A-Z][A-Z0-9_]{0,63}")
_TOO_LARGE = {errno.EMSGSIZE, errno.ENOBUFS}


class Journal(Sink):
    """Fields without a value are left out."""

    def __init__(self, fields: Mapping[str, object], *, path: Path = SOCKET, outbox: Outbox | None = None) -> None:
        super().__init__(fields, outbox)
        self._path = path
        self._socket: socket.socket | None = None

    def _encode_event(self, event_id: str, message: str, priority: int, fields: Mapping[str, object]) -> bytes:
        kind = {"MESSAGE_ID": message_id(event_id), "event": event_id} if event_id else {}
        return self._encode(message, priority, "vllmd", {**kind, **fields})

    def _encode_line(self, text: str, priority: int, fields: Mapping[str, object]) -> bytes:
        return self._encode(text, priority, "vllmd-engine", {"stream": "engine", **fields})

    def _encode(self, message: str, priority: int, identifier: str, fields: Mapping[str, object]) -> bytes:
        named = {"MESSAGE": message, "PRIORITY": priority, "SYSLOG_IDENTIFIER": identifier, **self._fields, **fields}
        return b"".join(encode_field(name, value) for name, value in named.items() if value not in ("", None))

    def _transmit(self, entry: bytes) -> Outcome:
        try:
            _send(self._connect(), entry)
        except BlockingIOError:
            return "blocked"
        except OSError as error:
            self._release()
            return "impossible" if error.errno in _TOO_LARGE else "gone"
        return "sent"

    def _connect(self) -> socket.socket:
        if self._socket is None:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                link.connect(str(self._path))  # connected, so that epoll tells when *that* queue has room
            except BaseException:
                link.close()
                raise
            self._socket = link
        return self._socket

    def _descriptor_now(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    def _release(self) -> None:
        self._forget_writer()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def encode_field(name: str, value: object) -> bytes:
    """One field of an entry; the form with a length where the value has more than one line."""
    known = name if name.isupper() else f"VLLMD_{name.upper()}"
    if not _FIELD.fullmatch(known):
        raise ValueError(f"{name!r} is no name of a journal field")
    data = str(value).encode(errors="replace")
    if b"\n" in data:
        return known.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return known.encode() + b"=" + data + b"\n"


def _send(link: socket.socket, entry: bytes) -> None:
    try:
        link.send(entry)
    except OSError as error:
        if error.errno not in _TOO_LARGE:
            raise
        _send_by_memfd(link, entry)


def _send_by_memfd(link: socket.socket, entry: bytes) -> None:
    """An entry larger than a datagram goes as a sealed memory file; journald refuses one that is not sealed."""
    descriptor = os.memfd_create("vllmd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(descriptor, entry)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        link.sendmsg([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))])
    finally:
        os.close(descriptor)


def open_journal(environ: Mapping[str, str], fields: Mapping[str, object], *, path: Path = SOCKET, stderr_fd: int = 2) -> Journal | Stderr:
    """The journal where systemd runs us, logfmt on stderr for a person or a container."""
    return Journal(fields, path=path) if _run_by_systemd(environ, path, stderr_fd) else Stderr(fields, descriptor=stderr_fd)


def _run_by_systemd(environ: Mapping[str, str], path: Path, stderr_fd: int) -> bool:
    """Not by INVOCATION_ID alone: every terminal of a desktop session inherits that."""
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(path.stat().st_mode) or os.isatty(stderr_fd):
            return False
        if environ.get("NOTIFY_SOCKET"):
            return True
        about = os.fstat(stderr_fd)
        return environ.get("JOURNAL_STREAM", "") == f"{about.st_dev}:{about.st_ino}"
    return False
