"""What the kernel's log says of GPUs: /dev/kmsg, one record for each read, filtered before anything is parsed.

    4,1234,5678901,-;NVRM: Xid (PCI:0000:10:00): 79, pid=1234, name=python3, GPU has fallen off the bus.

Reading it needs CAP_SYSLOG where dmesg is restricted; only the host unit has it. Only records of the kernel itself count:
whoever may write to /dev/kmsg cannot forge an error (facility 0 is the kernel's). A storm of 800,000 lines of few distinct
errors costs a look-up in a small table each; the loop gets its turn after every TURN of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllmd.core import xids
from vllmd.core.gpu_findings import Finding, canonical_pci, of_xid

KMSG = Path("/dev/kmsg")
TURN = 256
_CHUNK = 1 << 16
_DRIFT_S = 30.0
"""A live record that seems older than this is not old: the kernel's clock is another one."""
_MEMORY = 512
"""Distinct lines that are remembered as parsed."""

_RECORD = re.compile(rb"(\d{1,10}),(\d{1,20}),(\d{1,20}),[^;\n]*;(.*)")
_XID = re.compile(r"NVRM: Xid \((PCI:)?([0-9a-fA-F:.]{7,20})\): (\d{1,5})(?:, (.*))?")
_PID = re.compile(r"\bpid='?(\d{1,10})\b")
_NAME = re.compile(r"\bname=([^,]*)")
_OFF_BUS = re.compile(r"NVRM: (?:The NVIDIA )?GPU(?: at)? (?:PCI:)?([0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2})(?:\.\d)?.*fallen off the bus")
_UUID = re.compile(r"NVRM: GPU at PCI:([0-9a-fA-F:]{10,16}): (GPU-[0-9a-f-]{36})")
_ACTION = re.compile(r"(?:changed )?from 0x[0-9a-fA-F]+ \([^)]*\) to 0x([0-9a-fA-F]{1,4})")


@dataclass(frozen=True, slots=True)
class Line:
    """One of the kernel's lines that speaks of a GPU. `uuid` with `pci` alone: the driver says which is which. `action`: what
    an Xid 154 says the driver now asks for (None: no Xid 154, or it does not say)."""

    pci: str
    xid: int = 0
    pid: int = 0
    process: str = ""
    detail: str = ""
    uuid: str = ""
    action: int | None = None

    def finding(self, uuid: str, at: float) -> Finding:
        return of_xid(self.xid, uuid=uuid, pci=self.pci, pid=self.pid, process=self.process, detail=self.detail, at=at)


def parse(message: str) -> Line | None:
    """None for what is nothing to us. Numbers and names of the line are checked here, once."""
    if "NVRM:" not in message:
        return None
    text = "".join(each if each.isprintable() else "?" for each in message[:500])
    if found := _XID.match(text):
        return _xid_line(canonical_pci(found[2]), int(found[3]), found[4] or "")
    if found := _OFF_BUS.match(text):
        return Line(canonical_pci(found[1]), xids.FALLEN_OFF, detail="the kernel's line has no Xid")
    if found := _UUID.match(text):
        return Line(canonical_pci(found[1]), uuid=found[2])
    return None


def _xid_line(pci: str, number: int, rest: str) -> Line | None:
    if not number:
        return None
    pid, name, action = _PID.search(rest), _NAME.search(rest), None
    if number == xids.RECOVERY_CHANGED and (to := _ACTION.search(rest)):
        action = int(to[1], 16)
    process = name[1].strip("'<> ") if name else ""
    detail = ", ".join(part for part in rest.split(", ") if not part.startswith(("pid=", "name=")))[:160]
    return Line(pci, number, min(int(pid[1]), (1 << 31) - 1) if pid else 0, "" if process == "unknown" else process[:64], detail, action=action)


class Kmsg:
    """`told` gets each line that speaks of a GPU, and when it was written (monotonic). In the loop, without ever waiting.

    `path`: /dev/kmsg, or a pipe in its place (tests). It is read from the beginning of what the kernel still has: what came
    before this service started counts too, unless its number is not above `after`, or it was written before `since` (seconds
    since boot).

    Records are told apart by their numbers, which only grow. Their times do not: each processor has a clock of its own, and
    printk's drifts from ours by minutes a year. So they only say how old something is that was there before us; whatever
    comes once the log has been read to its end is new.
    """

    def __init__(self, told: Callable[[Line, float], None], path: Path = KMSG, since: float = 0.0, after: int = -1) -> None:
        self._told = told
        self._path = path
        self._since = since
        self._after = after
        self._is_live = False
        self.position = after
        """The number of the last record that was told, by us or by the service before us."""
        self._fd = -1
        self._rest = b""
        self._parsed: dict[bytes, Line | None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.lost = 0
        """Times that the kernel overwrote what was not read yet."""
        self.records = 0
        self.refused = ""
        """Why it cannot be read; '' while it is."""

    def start(self, loop: asyncio.AbstractEventLoop) -> bool:
        try:
            kind = self._path.stat().st_mode
            # A pipe is opened for writing too: else its end would be read, for ever, while nobody writes.
            self._fd = os.open(self._path, (os.O_RDWR if stat.S_ISFIFO(kind) else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC)
            loop.add_reader(self._fd, self._read)
        except OSError as error:
            self.refused = f"{self._path}: {error.strerror}"
            self.close()
            return False
        self._loop = loop
        loop.call_soon(self._read)  # a log that is empty has been read to its end
        return True

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            if self._loop is not None:
                self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> None:
        """TURN records at most; epoll says at once when there are more."""
        for _ in range(TURN if self._fd >= 0 else 0):
            try:
                piece = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                self._is_live = True
                return
            except OSError as error:
                if error.errno == errno.EPIPE:  # overwritten before it was read: it goes on with the oldest there is
                    self.lost += 1
                    continue
                self.refused = f"{self._path}: {error.strerror}"
                self.close()
                return
            if not piece:
                return
            self._take(piece)
            if len(piece) > _CHUNK // 2:  # of a pipe: hundreds of records at once
                return

    def _take(self, piece: bytes) -> None:
        *records, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _CHUNK:
            self._rest = b""
        self.records += len(records)
        for record in records:
            if b"NVRM" in record:
                self._one(record)

    def _one(self, record: bytes) -> None:
        found = _RECORD.fullmatch(record)
        if found is None or int(found[1]) >> 3:
            return
        number, written = int(found[2]), int(found[3]) / 1e6
        if not self._is_live and (number <= self._after or written < self._since):
            return
        self.position = number
        if self._is_live and not 0 <= now() - written <= _DRIFT_S:
            written = now()
        message = found[4]
        if message in self._parsed:
            line = self._parsed[message]
        else:
            if len(self._parsed) >= _MEMORY:
                self._parsed.clear()
            line = self._parsed[message] = parse(message.decode(errors="replace"))
        if line is not None:
            self._told(line, written)


def now() -> float:
    """The clock of the records: seconds since boot, without those of a suspend."""
    return time.monotonic()


def readable(path: Path = KMSG) -> str:
    """'' where it can be read, else why not."""
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        return ""
    return f"{path} cannot be read (it needs CAP_SYSLOG where dmesg is restricted)"
