"""What the supervisor of a ready instance costs: private memory and CPU, scraped and not, beside supervisord."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import group, processes
from bench.place import Place
from bench.table import Figure

MEMORY_BAR_MIB = 48.0
CPU_BAR_PCT = 0.5
WINDOW_S = 60.0
SETTLE_S = 5.0
SCRAPE_S = 15.0
"""Prometheus' usual interval."""


@dataclass(slots=True)
class Cost:
    """A process in the window."""

    pid: int
    began_ns: int = 0
    cpu_pct: float = 0.0
    memory_mib: float = 0.0

    def begin(self) -> None:
        self.began_ns = processes.cpu_ns(self.pid)

    def end(self, seconds: float) -> None:
        self.cpu_pct = (processes.cpu_ns(self.pid) - self.began_ns) / 1e7 / seconds
        self.memory_mib = processes.private_mib(self.pid)


def run() -> list[Figure]:
    """All in one window of time."""
    with contextlib.ExitStack() as stack:
        envs: list[dict[str, str]] = [{}, {}, {"BENCH_RUNNING": "3"}]
        places = [stack.enter_context(Place(cgroup=group.available(), env=env)) for env in envs]
        for place in places:
            place.start()
        for place in places:
            place.ready_at()
        others = {"supervisord": stack.enter_context(_supervisord(places[0])), "a Python with asyncio alone": stack.enter_context(_python())}
        quiet, scraped, busy = (Cost(place.pid) for place in places)
        rest = {name: Cost(pid) for name, pid in others.items() if pid}
        _window([quiet, scraped, busy, *rest.values()], places[1])
        for place in places:
            place.stop()
    memory = "; ".join(f"{name}: {cost.memory_mib:.1f} MiB" for name, cost in rest.items())
    cpu = "; ".join(f"{name}: {cost.cpu_pct:.3f} %" for name, cost in rest.items())
    return [
        Figure("supervisor, ready: private memory", [quiet.memory_mib], "MiB", MEMORY_BAR_MIB, against=memory),
        Figure("  scraped", [scraped.memory_mib], "MiB", MEMORY_BAR_MIB, against=f"GET /metrics every {SCRAPE_S:g} s"),
        Figure(f"supervisor, ready: CPU over {WINDOW_S:g} s, of one core", [quiet.cpu_pct], "%", CPU_BAR_PCT, against=cpu),
        Figure("  scraped", [scraped.cpu_pct], "%", CPU_BAR_PCT, against=f"GET /metrics every {SCRAPE_S:g} s, the first one included"),
        Figure("  its engine is busy", [busy.cpu_pct], "%", CPU_BAR_PCT, against="its heartbeat is read every second, 50 KB of metrics"),
    ]


def _window(costs: list[Cost], scraped: Place) -> None:
    time.sleep(SETTLE_S)
    began = time.monotonic()
    for cost in costs:
        cost.begin()
    for turn in range(round(WINDOW_S / SCRAPE_S)):
        scraped.metrics()
        time.sleep(max(0.0, began + (turn + 1) * SCRAPE_S - time.monotonic()))
    seconds = time.monotonic() - began
    for cost in costs:
        cost.end(seconds)


@contextlib.contextmanager
def _running(argv: list[str], env: dict[str, str]) -> Iterator[int]:
    with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            yield child.pid
        finally:
            child.kill()


@contextlib.contextmanager
def _supervisord(place: Place) -> Iterator[int]:
    """With a child to look after; 0 where it is not installed. vLLM's environment brings it."""
    program = next((path for path in _supervisords() if path.exists()), None)
    if program is None:
        yield 0
        return
    config = place.root / "supervisord.conf"
    child = f"{sys.executable} -c 'import signal; signal.pause()'"
    config.write_text(f"[supervisord]\nnodaemon=true\nlogfile={place.root}/supervisord.log\npidfile={place.root}/supervisord.pid\n[program:engine]\ncommand={child}\n")
    with _running([str(program), "-c", str(config)], {**place.environ(), **place.engine_env}) as pid:
        yield pid


def _supervisords() -> list[Path]:
    return [engines() / "current/bin/supervisord", Path("/usr/bin/supervisord")]


def engines() -> Path:
    """Where `make setup` installs the real engine."""
    return Path(os.environ.get("VLLMD_TEST_ENGINES") or Path.home() / ".cache/vllmd-dev/engines")


@contextlib.contextmanager
def _python() -> Iterator[int]:
    script = "import asyncio; asyncio.run(asyncio.sleep(600))"
    with _running([sys.executable, "-c", script], dict(os.environ)) as pid:
        yield pid
