"""Python stacks of the engine's processes, by py-spy where it is installed: in the engine's environment, or on PATH.

`--nonblocking`: it neither stops the process nor needs ptrace(2), which the unit's filter refuses; it reads the memory of
a process of our own user (where kernel.yama.ptrace_scope is 1 or more, it may not, and says so). vLLM registers no
faulthandler signal (0.32), and any signal that a process does not handle would kill it: none is ever sent.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllmd.instance.evidence_sheet import Sheet
from vllmd.preflight import child
from vllmd.system.threads import in_thread

DUMPED, AT_ONCE, DUMP_S = 16, 4, 2.0
_DUMP_BYTES = 64 << 10


def find_py_spy(executable: str, environ: Mapping[str, str]) -> str:
    """'' where there is none."""
    beside = Path(executable).parent / "py-spy"
    if os.access(beside, os.X_OK):
        return str(beside)
    return shutil.which("py-spy", path=environ.get("PATH", "/usr/local/bin:/usr/bin:/bin")) or ""


async def python_stacks(sheet: Sheet, program: str, pids: Sequence[int]) -> None:
    """The largest processes come first in `pids`; what is no Python process says so in a line."""
    gate = asyncio.Semaphore(AT_ONCE)
    argv = ["/bin/sh", "-c", 'exec "$0" "$@" 2>&1', program, "dump", "--nonblocking", "--pid"]

    async def one(pid: int) -> None:
        async with gate:
            outcome = await in_thread(lambda: child.run([*argv, str(pid)], timeout_s=DUMP_S, environ={"LANG": "C.UTF-8", "RUST_BACKTRACE": "0"}))
        late = "\n(py-spy did not end in time)" if outcome.timed_out else ""
        sheet.add(f"=== {pid}\n{outcome.output[:_DUMP_BYTES].rstrip()}{late}\n\n")

    try:
        await asyncio.gather(*map(one, pids[:DUMPED]))
    except asyncio.CancelledError:
        child.kill_running()
        raise
