"""The engine's processes as /proc shows them: a table, and what each of their threads waits for.

Only files that the kernel answers without the process's memory map (cmdline and environ wait for its lock, and a process
that hangs in a page fault holds it); each process is read in a thread of its own all the same, so that one that hangs
costs its own lines and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vllmd.instance.evidence_sheet import Sheet
from vllmd.system.threads import in_thread

TABLED, LISTED, THREADS, AT_ONCE = 256, 48, 64, 8
RANK_S = 0.5
_FILE_BYTES = 8192
_STATUS = ("State", "Threads", "VmRSS", "VmSwap", "VmPeak", "SigBlk", "SigIgn", "SigCgt", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
_HEAD = f"{'PID':>8} {'PPID':>8} S {'THREADS':>7} {'CPU_S':>10} {'RSS_MIB':>9}  COMM\n"


class Processes:
    """`proc` is /proc. `largest` names the processes by memory, once the table is made."""

    def __init__(self, pids: Sequence[int], proc: Path = Path("/proc")) -> None:
        self._pids = tuple(pids)
        self._proc = proc
        self._rss: dict[int, int] = {}
        self.count = len(self._pids)
        self._tabled = asyncio.Event()

    async def table(self, sheet: Sheet) -> None:
        sheet.add(_HEAD)
        if self.count > TABLED:
            sheet.note = f"the first {TABLED} of {self.count} processes"
        try:
            await self._each(self._pids[:TABLED], lambda pid: sheet.add(self._row(pid)))
        finally:
            self._tabled.set()

    async def ranked(self) -> None:
        """Until `largest` can tell, or half a second: the others then go by their order."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._tabled.wait(), RANK_S)

    async def waits(self, sheet: Sheet) -> None:
        """Per process and thread: state, wait channel, system call, kernel stack where we may read it."""
        if self.count > LISTED:
            sheet.note = f"the {LISTED} largest of {self.count} processes"
        await self._each(self.largest(LISTED), lambda pid: sheet.add(self._waits(pid)))

    def largest(self, count: int) -> tuple[int, ...]:
        return tuple(sorted(self._pids, key=lambda pid: -self._rss.get(pid, 0))[:count])

    async def _each(self, pids: Sequence[int], look: Callable[[int], object]) -> None:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(pid: int) -> None:
            async with gate:
                await in_thread(lambda: look(pid))

        await asyncio.gather(*map(one, pids), return_exceptions=True)

    def _row(self, pid: int) -> str:
        fields, comm = self._stat(self._proc / str(pid) / "stat")
        if len(fields) < 22:
            return f"{pid:>8}  gone\n"
        self._rss[pid] = int(fields[21]) * os.sysconf("SC_PAGESIZE")
        cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return f"{pid:>8} {fields[1]:>8} {fields[0]} {fields[17]:>7} {cpu:>10.2f} {self._rss[pid] / (1 << 20):>9.1f}  {comm}\n"

    def _waits(self, pid: int) -> str:
        folder = self._proc / str(pid)
        fields, comm = self._stat(folder / "stat")
        if not fields:
            return f"=== {pid}: gone\n"
        status = [line for line in self._read(folder / "status").splitlines() if line.partition(":")[0] in _STATUS]
        lines = [f"=== {pid} {comm}", *("  " + " ".join(line.split()) for line in status)]
        try:
            tasks = sorted(int(name) for name in os.listdir(folder / "task") if name.isdigit())  # noqa: PTH208
        except OSError:
            tasks = []
        for tid in tasks[:THREADS]:
            lines += self._thread(folder / "task" / str(tid), tid)
        if len(tasks) > THREADS:
            lines.append(f"  ... and {len(tasks) - THREADS} threads")
        return "\n".join(lines) + "\n\n"

    def _thread(self, folder: Path, tid: int) -> list[str]:
        fields, comm = self._stat(folder / "stat")
        if not fields:
            return []
        wchan = self._read(folder / "wchan").strip("\0\n 0") or "-"
        syscall = self._read(folder / "syscall").strip() or "-"
        lines = [f"  thread {tid} {comm}: state {fields[0]}, waits in {wchan}, system call {syscall[:120]}"]
        return lines + [f"      {line}" for line in self._read(folder / "stack").splitlines()[:32]]

    def _stat(self, path: Path) -> tuple[list[str], str]:
        """The fields after the name (the state is the first), and the name, which may hold anything."""
        text = self._read(path)
        head, bracket, rest = text.rpartition(")")
        return (rest.split(), head.partition("(")[2].replace("\n", " ")) if bracket else ([], "")

    def _read(self, path: Path) -> str:
        try:
            with path.open("rb", buffering=0) as file:
                return (file.read(_FILE_BYTES) or b"").decode(errors="replace")
        except OSError:
            return ""
