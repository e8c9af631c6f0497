"""The host's GPU watch (`vllmd gpu-watch`) as a real process, over the stub of the driver and a pipe in the kernel log's place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tests import procs
from tests.fakes.nvml import Stub, pci
from tests.notify_socket import NotifySocket
from vllmd.config.paths import root_paths


class KernelLog:
    """A pipe; what is written arrives as records of the kernel."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "kmsg"
        os.mkfifo(self.path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self._said: list[bytes] = []

    def say(self, text: str, *, facility: int = 0, at: float | None = None) -> None:
        written = time.monotonic() if at is None else at
        self._said.append(f"{facility << 3 | 4},{len(self._said) + 1},{int(written * 1e6)},-;{text}\n SUBSYSTEM=pci\n".encode())
        self.write(self._said[-1])

    def replay(self) -> None:
        """The kernel's log gives all that it still has to whoever opens it; a pipe, what nobody has read yet."""
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(self._fd, False)
            while os.read(self._fd, 1 << 16):
                pass
        os.set_blocking(self._fd, True)
        self.write(b"".join(self._said))

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def xid(self, number: int, index: int = 0, pid: int = 0, rest: str = "", **more: Any) -> None:
        of = f", pid={pid}, name=python3" if pid else ""
        self.say(f"NVRM: Xid (PCI:{pci(index)}): {number}{of}{', ' + rest if rest else ''}", **more)

    def close(self) -> None:
        os.close(self._fd)


class Listener:
    """A client of /events; `at` of each line is when it arrived (monotonic)."""

    def __init__(self, path: Path, query: str = "") -> None:
        self.findings: list[tuple[float, dict[str, Any]]] = []
        self.snapshots: list[tuple[float, dict[str, Any]]] = []
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._link.connect(str(path))
        self._link.sendall(f"GET /events{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._link.makefile("rb") as lines:
            for line in lines:
                now = time.monotonic()
                if line.startswith(b'{"finding"'):
                    self.findings.append((now, json.loads(line)["finding"]))
                elif line.startswith(b'{"snapshot"'):
                    self.snapshots.append((now, json.loads(line)["snapshot"]))

    def finding(self, timeout_s: float = 10.0, **wanted: Any) -> tuple[float, dict[str, Any]]:
        """The first that has these values."""

        def look() -> tuple[float, dict[str, Any]] | None:
            return next((each for each in list(self.findings) if wanted.items() <= each[1].items()), None)

        found = procs.wait_until(f"a finding with {wanted}, of {self.findings}", look, timeout_s)
        assert found
        return found

    def snapshot(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 10.0) -> dict[str, Any]:
        """The first, from now on or the latest, that is as wanted."""
        seen = max(0, len(self.snapshots) - 1)

        def look() -> dict[str, Any] | None:
            return next((document for _, document in self.snapshots[seen:] if wanted(document)), None)

        found = procs.wait_until("a snapshot as wanted", look, timeout_s)
        assert found
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._link.close()


class GpuService:
    """Up and ready within the `with`. `settings` are of gpu_watch; `observe` names detectors."""

    def __init__(self, gpus: int = 1, *, observe: str = "", env: Mapping[str, str] | None = None, kmsg: str = "", drm: str = "", start: bool = True, **settings: Any) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="g-"))
        self.paths = root_paths(self.root)
        self.stub = Stub(self.root, gpus)
        self.log = KernelLog(self.root)
        self.notify = NotifySocket(self.root / "notify")
        self.stderr = self.root / "stderr"
        self._observe, self._env, self._kmsg, self._drm, self._start = observe, env or {}, kmsg or str(self.log.path), drm, start
        self._settings = {"interval_s": 0.1, "call_timeout_s": 10.0, **settings}
        self._listeners: list[Listener] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = [f"gpu_watch.{key}={value}" for key, value in self._settings.items()] + ([f"watch.observe={self._observe}"] if self._observe else [])
        sets = [each for word in words for each in ("--set", word)]
        drm = self._drm or str(self.root / "no-drm")
        command = [sys.executable, "-m", "vllmd.cli", "--root", str(self.root), "gpu-watch", "--kmsg", self._kmsg, "--drm", drm, *sets]
        environ = {**os.environ, "LD_LIBRARY_PATH": "", **self.stub.environ(), "NOTIFY_SOCKET": str(self.notify.path), **self._env}
        self.notify.forget()
        with self.stderr.open("ab") as stderr:
            self.process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, start_new_session=True)
        process = self.process
        assert self.notify.wait(lambda message: message.get("READY") == "1", 20, lambda: process.poll() is not None), self.said()

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(10)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def sampler(self, timeout_s: float = 10.0) -> procs.Process:
        """The one that runs now."""

        def look() -> procs.Process | None:
            return next((each for each in procs.processes() if each.ppid == self.pid and "gpu.sampler" in each.cmdline), None)

        found = procs.wait_until("a sampler", look, timeout_s)
        assert found
        return found

    def listen(self, query: str = "") -> Listener:
        self._listeners.append(Listener(self.paths.gpu_socket, query))
        return self._listeners[-1]

    def ask(self, path: str = "/status") -> bytes:
        """The body."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(10)
            link.connect(str(self.paths.gpu_socket))
            link.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            data = b""
            while piece := link.recv(65536):
                data += piece
        return data.partition(b"\r\n\r\n")[2]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask())
        return found

    def said(self) -> str:
        return self.stderr.read_text(errors="replace")

    def __enter__(self) -> Self:
        try:
            if self._start:
                self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.close()
        left: list[int] = []
        if self.process is not None:
            left = [each.pid for each in procs.processes() if each.ppid == self.process.pid]
            with contextlib.suppress(OSError):
                self.process.send_signal(signal.SIGCONT)
            if self.process.poll() is None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
        self.notify.close()
        self.log.close()
        procs.kill_all(left)
        shutil.rmtree(self.root)
