"""`python -m bench [--quick] [--only NAME]...`: measures, and prints one table.

A quarter of an hour; --quick leaves out the real vLLM and the download, which take most of it. Everything that is started or made is gone at
the end, also after Ctrl-C. Root sees more: cgroups of the benchmark's own, and other users' processes.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from bench import (
    download,
    gpus,
    headers,
    idle,
    killing,
    noop,
    noticing,
    port_check,
    processes,
    ready,
    real,
    reverify,
    seeing,
    spawning,
    warmup,
)
from bench.place import BenchError
from bench.table import Figure, compared, render

TOOLS = ("walk ", "ss ", "lsof ")
SLOW = ("real", "download")


def _port_check() -> list[Figure]:
    """Its rows are medians already; those of other tools stand beside the row that has a bar."""
    rows = port_check.run()
    tools = "; ".join(compared(row.what, [row.milliseconds] if row.milliseconds else [], "ms") for row in rows if row.what.startswith(TOOLS))
    return [
        Figure(
            row.what,
            [] if row.milliseconds is None else [row.milliseconds],
            "ms",
            row.bar_ms or None,
            against=f"median of {port_check.ROUNDS}" + (f"; {tools}" if row.what.startswith("port held: ") else ""),
        )
        for row in rows
        if not row.what.startswith(TOOLS)
    ]


PARTS: dict[str, tuple[str, Callable[[], list[Figure]]]] = {
    "spawn": ("exec to exec", spawning.run),
    "ready": ("/health to READY=1 (2 to 4 minutes)", ready.run),
    "kill": ("SIGKILL of the engine", killing.run),
    "notice": ("deaths and hangs of a ready engine (2 minutes)", noticing.run),
    "gpu": ("errors of GPUs, over the stub of the driver (3 minutes)", gpus.run),
    "idle": ("a ready supervisor, for a minute", idle.run),
    "seeing": ("what people type again and again, and top with 20 instances (a minute)", seeing.run),
    "port": ("the port check with 2,000 processes and 20,000 sockets", _port_check),
    "headers": ("validating the headers of a large model", headers.run),
    "reverify": ("re-verification of 3 GB in memory", reverify.run),
    "warmup": ("starts with and without the pass over the weights, cold and warm (4 minutes)", warmup.run),
    "noop": ("resolving a large model that is there", noop.run),
    "download": ("3 GB from a store in memory, beside what fetches it otherwise (5 to 8 minutes)", download.run),
    "real": ("starts of the real vLLM, in turns (5 to 10 minutes)", real.run),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--quick", action="store_true", help="without the real vLLM, and without the download")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="NAME", help=f"some parts: {', '.join(PARTS)}")
    options = parser.parse_args()
    names = options.only or [name for name in PARTS if not (options.quick and name in SLOW)]
    processes.adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    print(_machine(), flush=True)
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        figures, failed = _measure(names)
    except KeyboardInterrupt:
        print("interrupted; everything is cleaned up", file=sys.stderr)
        return 130
    print(render(figures))
    print(f"\n{time.monotonic() - began:.0f} s; load average {load:.2f} before, {os.getloadavg()[0]:.2f} after")
    return 1 if failed else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Once: a second Ctrl-C must not cut the cleaning up."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _measure(names: list[str]) -> tuple[list[Figure], bool]:
    """A part that fails says so in its place; the others are measured all the same."""
    figures: list[Figure] = []
    failed = False
    for name in names:
        print(f"{name}: {PARTS[name][0]} ...", file=sys.stderr, flush=True)
        try:
            figures += PARTS[name][1]()
        except BenchError as error:
            failed = True
            print(error, file=sys.stderr)
            figures.append(Figure(PARTS[name][0], missing=f"failed: {str(error).splitlines()[0]}"))
    return figures, failed


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}\n"


if __name__ == "__main__":
    sys.exit(main())
