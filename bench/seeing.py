"""How long the commands take that people and load balancers type again and again, and what `vllmctl top` costs with 20 instances.

The instances are files and sockets as their supervisors leave them, all of them busy: each is written again every second.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import processes
from bench.place import BenchError
from bench.table import Figure
from vllmd.config.paths import Paths, root_paths
from vllmd.instance.board import NO_PROGRESS, now_text
from vllmd.models import demo

INSTANCES, ROUNDS, WINDOW_S, SETTLE_S = 20, 15, 30.0, 6.0
CPU_BAR_PCT, STATUS_BAR_MS, HELP_BAR_MS = 3.0, 300.0, 200.0
_CTL = "import sys; from vllmd.ctl import main; sys.exit(main())"
_VLLMD = "import sys; from vllmd.cli import main; sys.exit(main())"


def run() -> list[Figure]:
    with _host() as paths:
        root = str(paths.config.parent)
        rows = [
            _quick("Python alone", ["-c", "pass"], None),
            _quick("vllmctl --help", ["-c", _CTL, "--help"], HELP_BAR_MS),
            _quick(f"vllmctl status, {INSTANCES} instances", ["-c", _CTL, "--root", root, "status"], STATUS_BAR_MS),
            _quick("vllmctl status NAME", ["-c", _CTL, "--root", root, "status", "busy-00"], STATUS_BAR_MS),
            _quick("vllmd --help", ["-c", _VLLMD, "--help"], HELP_BAR_MS),
            _quick("vllmd check NAME, its memory reckoned", ["-c", _VLLMD, "--root", root, "check", "busy-00"], STATUS_BAR_MS),
            _quick("vllmctl health NAME", ["-c", _CTL, "--root", root, "health", "busy-00"], HELP_BAR_MS),
        ]
        own, all_ = _top(root)
    return [*rows, Figure(f"vllmctl top, {INSTANCES} busy instances: CPU, of one core", [own], "%", CPU_BAR_PCT, against=f"with what it starts: {all_:.2f} %; every second, 80x24")]


def _quick(what: str, arguments: list[str], bar_ms: float | None) -> Figure:
    """Its processor time stands beside it: that is the same on a host that has other things to do."""

    def one() -> tuple[float, float]:
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return (time.monotonic() - began) * 1000, spent * 1000

    one()
    found = [one() for _ in range(ROUNDS)]
    walls, cpus = zip(*found, strict=True)
    return Figure(what, walls, "ms", bar_ms, against=f"fastest: {min(walls):.0f} ms; processor time: {statistics.median(cpus):.0f} ms")


def _top(root: str) -> tuple[float, float]:
    """Its own share of a core, and with its children, those that it has by then included."""
    pid, master = pty.fork()
    if not pid:
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, "-c", _CTL, "--root", root, "top"], {**os.environ, "TERM": "xterm-256color", "LINES": "24", "COLUMNS": "80"})
        os._exit(127)
    reader = threading.Thread(target=_drain, args=(master,), daemon=True)
    reader.start()
    try:
        time.sleep(SETTLE_S)
        if not processes.is_alive(pid):
            raise BenchError("vllmctl top ended")
        children = [child for child in _children(pid) if processes.is_alive(child)]
        before = [processes.cpu_ns(each) for each in (pid, *children)]
        time.sleep(WINDOW_S)
        after = [processes.cpu_ns(each) for each in (pid, *children)]
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        os.close(master)
    spent = [(now - then) / 1e7 / WINDOW_S for then, now in zip(before, after, strict=True)]
    return spent[0], sum(spent)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _drain(master: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(master, 1 << 16):
            pass


@contextlib.contextmanager
def _host() -> Iterator[Paths]:
    with tempfile.TemporaryDirectory(prefix="vllmd-bench-") as folder, contextlib.ExitStack() as stack:
        paths = root_paths(Path(folder))
        paths.config.mkdir()
        demo.make(Path(folder) / "model", seed=1)
        (Path(folder) / "vllm").write_text("#!/bin/sh\n")
        (Path(folder) / "vllm").chmod(0o755)
        engine = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        names = [f"busy-{number:02}" for number in range(INSTANCES)]
        for name in names:
            paths.instance_config(name).write_text(f"model: {{path: {folder}/model}}\nengine: {{executable: {folder}/vllm}}\n")
            paths.instance_runtime(name).mkdir(parents=True)
            control = stack.enter_context(socket.socket(socket.AF_UNIX))
            control.bind(str(paths.instance_runtime(name) / "control.sock"))
            control.listen(4096)
        over = threading.Event()
        writer = threading.Thread(target=_write, args=(paths, names, f"http://127.0.0.1:{engine.getsockname()[1]}", over))
        writer.start()
        stack.callback(writer.join)
        stack.callback(over.set)
        while not (paths.instance_runtime(names[-1]) / "status.json").exists():
            time.sleep(0.05)
        yield paths


def _write(paths: Paths, names: list[str], endpoint: str, over: threading.Event) -> None:
    turn = 0
    while True:
        for number, name in enumerate(names):
            path = paths.instance_runtime(name) / "status.json"
            path.with_suffix(".new").write_text(json.dumps(_document(name, endpoint, turn + number)))
            path.with_suffix(".new").rename(path)
        turn += 1
        if over.wait(1.0):
            return


def _document(name: str, endpoint: str, turn: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "instance": name,
        "state": "ready",
        "since": now_text(),
        "phase": "ready",
        "progress": dict(NO_PROGRESS),
        "model": {"id": "Qwen/Qwen3-8B", "directory": "/var/lib/vllmd/models/x", "via": "hf-hub", "served_name": name},
        "endpoint": endpoint,
        "endpoints": [endpoint],
        "error": None,
        "gpus": [],
        "load": {"running": turn % 17, "waiting": turn % 3, "tokens_per_s": turn * 7.3 % 900, "prompt_tokens_per_s": turn * 31.1 % 5000, "kv_cache_ratio": turn % 100 / 100},
        "last_event": {"at": now_text(), "event": "engine-ready", "text": f"Serving {name}", "priority": 5},
    }
