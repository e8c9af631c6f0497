"""What vLLM prints: its own format on stdout, uvicorn and tqdm on stderr, and the ways in which output goes wrong."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass

BANNER = (
    "",
    "       █     █     █▄   ▄█",
    " ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.32.0",
    "  █▄█▀ █     █     █     █  model   {model}",
    "   ▀▀  ▀▀▀▀▀ ▀▀▀▀▀ ▀     ▀",
    "",
)


@dataclass
class Output:
    """One process's output. `who` is the prefix ('APIServer', 'EngineCore', 'Worker')."""

    who: str
    silent: bool = False
    access_log: bool = True

    def log(self, text: str, level: str = "INFO", place: str = "api_server.py:1") -> None:
        stamp = time.strftime("%m-%d %H:%M:%S")
        self.write(1, f"({self.who} pid={os.getpid()}) {level} {stamp} [{place}] {text}\n".encode())

    def plain(self, text: str) -> None:
        """uvicorn's lines of its own life."""
        self.write(2, f"{text}\n".encode())

    def access(self, client: str, request: str, status: str) -> None:
        if self.access_log:
            self.write(1, f'INFO:     {client} - "{request}" {status}\n'.encode())

    def banner(self, model: str) -> None:
        for line in BANNER:
            self.log(line.format(model=model), place="api_utils.py:347")

    def shards(self, done: int, total: int) -> None:
        """tqdm overwrites its line: a carriage return in front, a newline only after the last."""
        bar = f"\rLoading safetensors checkpoint shards: {done * 100 // total:3d}% Completed | {done}/{total} [00:00<00:00, 440.60it/s]"
        self.write(2, (bar + ("\n\n" if done == total else "")).encode())

    def write(self, fd: int, data: bytes) -> None:
        """Goes on when the reader is gone, as vLLM does."""
        view = memoryview(b"" if self.silent else data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except OSError:
            self.silent = True


def block(kind: str) -> bytes:
    """One write of the fault."""
    if kind == "long":
        return b"x" * 10_000_000 + b"\n"
    if kind == "broken":
        return b"\xff\xfe caf\xe9 \xe2\x82 half a euro, \x00 a NUL, \x1b[31m an escape\n"
    line = b"(EngineCore pid=1) INFO 01-01 00:00:00 [flood.py:1] " + b"y" * 75 + b"\n"
    return line * 512


def start_fault(kind: str, limit_mb: float) -> None:
    """In a thread, for ever or up to the limit."""
    if kind in ("normal", "silent"):
        return
    data, sink = block(kind), Output("")

    def pour() -> None:
        written = 0
        while not sink.silent and (not limit_mb or written < limit_mb * 1e6):
            sink.write(1, data)
            written += len(data)
            if kind == "broken":
                time.sleep(0.001)

    threading.Thread(target=pour, daemon=True).start()


def die(text: str, code: int) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    os._exit(code)
