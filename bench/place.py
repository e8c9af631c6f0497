"""Where a benchmark runs: a root of its own with a model, an engine and a notify socket, gone without a trace at the end.

    with Place(cgroup=True, config={"start": {"proof": "health"}}) as place:
        began = place.start()
        print(place.ready_at() - began)
        place.stop()
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from bench import processes
from bench.group import ServiceGroup
from vllmd.engines import record
from vllmd.models import demo

NAME = "demo"
MARK = "BENCH_ROOT"
STUB = Path(__file__).with_name("stub.py")
FLAGS = ("--disable-uvicorn-access-log", "--host", "--port", "--served-model-name", "--shutdown-timeout", "--uds")
WATCHDOG_S = 30
"""WatchdogSec= of the unit."""
T = TypeVar("T")


class BenchError(Exception):
    """A measurement did not come about; the text says what was missed, with the daemon's last lines."""


class Notify:
    """The other end of NOTIFY_SOCKET: each message with the monotonic time at which it came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[tuple[float, bytes]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := self._socket.recv(65536):
            self.messages.append((time.monotonic(), data))

    def time_of(self, word: bytes) -> float:
        """0.0 when it has not come."""
        return next((at for at, data in self.messages if word in data.splitlines()), 0.0)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", str(self.path))
        self._thread.join(5)
        self._socket.close()


class Place:
    """One root and its instance. `env` goes to the engine; `engines` is a directory of real engines (default: the stub)."""

    def __init__(
        self,
        *,
        cgroup: bool = False,
        config: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        engines: Path | None = None,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="vllmd-bench-"))
        self.daemon: subprocess.Popen[bytes] | None = None
        self._closing = contextlib.ExitStack()
        self._closing.callback(shutil.rmtree, self.root)
        try:
            self._furnish(config or {}, env or {}, engines)
            self.group = ServiceGroup() if cgroup else None
            if self.group:
                self._closing.callback(self.group.remove)
            self.notify = Notify(self.root / "notify")
            self._closing.callback(self.notify.close)
            self._closing.callback(self._end_all)
        except BaseException:
            self._closing.close()
            raise

    def _furnish(self, config: Mapping[str, Any], env: Mapping[str, str], engines: Path | None) -> None:
        self.stamps = self.root / "stamps"
        self.stamps.mkdir()
        self.port = free_port()
        self.model = demo.make(self.root / "model")
        self.engine_env = {MARK: str(self.root), "BENCH_STAMPS": str(self.stamps), "TMPDIR": str(self.root), **env}
        if engines:
            (self.root / "engines").symlink_to(engines)
        else:
            install_stub(self.root / "engines")
        self.write_config(config)

    # Files.

    def write_config(self, config: Mapping[str, Any]) -> None:
        """JSON is YAML. One section replaces or adds to another."""
        base: dict[str, Any] = {
            "model": {"path": str(self.model)},
            "serve": {"port": self.port, "served_model_name": "tiny", "auth": "none"},  # as the bare engine beside it
            "gpus": "none",
            "engine": {"env": {}},
        }
        for key, value in config.items():
            base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
        base["engine"]["env"] = {**base["engine"]["env"], **self.engine_env}
        (self.root / "etc").mkdir(exist_ok=True)
        (self.root / f"etc/{NAME}.yaml").write_text(json.dumps(base, indent=1))
        self.config = base

    @property
    def engine(self) -> Path:
        return self.root / "engines" / record.CURRENT / "bin/vllm"

    def launch(self) -> dict[str, Any]:
        return dict(json.loads((self.root / f"lib/instances/{NAME}/launch.json").read_text()))

    def log(self) -> str:
        with contextlib.suppress(OSError):
            return (self.root / "log").read_text(errors="replace")
        return ""

    def metrics(self) -> str:
        """GET /metrics of the running daemon."""
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(10)
            link.connect(str(self.root / f"run/i/{NAME}/control.sock"))
            link.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return b"".join(iter(lambda: link.recv(65536), b"")).decode().partition("\r\n\r\n")[2]

    # The daemon.

    def command(self) -> list[str]:
        """The program that a unit would execute."""
        installed = Path(sys.prefix) / "bin/vllmd"
        program = [str(installed)] if installed.exists() else [sys.executable, "-m", "vllmd.cli"]
        return [*program, "--root", str(self.root), "run", NAME]

    def environ(self) -> dict[str, str]:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.root), "LANG": "C.UTF-8", MARK: str(self.root)}
        env |= {"NOTIFY_SOCKET": str(self.notify.path), "WATCHDOG_USEC": str(WATCHDOG_S * 1_000_000)}
        return env | ({"INVOCATION_ID": "0" * 32} if self.group else {})

    def start(self) -> float:
        """Returns the monotonic time just before the fork and exec; they count."""
        self._forget()
        argv = self.group.enter(self.command()) if self.group else self.command()
        with (self.root / "log").open("ab") as log:
            began = time.monotonic()
            self.daemon = subprocess.Popen(argv, env=self.environ(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        return began

    @property
    def pid(self) -> int:
        assert self.daemon is not None
        return self.daemon.pid

    def stop(self, number: int = signal.SIGTERM) -> None:
        assert self.daemon is not None
        if self.daemon.poll() is None:
            self.daemon.send_signal(number)
        self.wait_exit()

    def wait_exit(self, timeout_s: float = 60.0) -> int:
        assert self.daemon is not None
        try:
            return self.daemon.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise BenchError(f"vllmd did not end within {timeout_s:g} s\n{self.log()[-2000:]}") from None

    @contextlib.contextmanager
    def alone(self, argv: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Iterator[float]:
        """The engine, or another command, without vllmd, until the end of the block; the monotonic time before its exec."""
        self._forget()
        bare = [str(self.engine), "serve", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.root / "log").open("ab") as log:
            began = time.monotonic()
            self.daemon = subprocess.Popen(
                argv or bare, env={**self.environ(), **self.engine_env, **(env or {})}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            yield began
        finally:
            self.stop(signal.SIGKILL)

    def _forget(self) -> None:
        for path in self.stamps.iterdir():
            path.unlink()
        self.notify.messages.clear()

    # What is waited for.

    def stamp(self, name: str, timeout_s: float = 30.0) -> float:
        """When the stub did that: born, listening, healthy."""
        path = self.stamps / name
        return self.wait(f"the engine's stamp {name!r}", lambda: float(path.read_text()) if path.exists() else 0.0, timeout_s)

    def ready_at(self, timeout_s: float = 30.0) -> float:
        return self.wait("READY=1", lambda: self.notify.time_of(b"READY=1"), timeout_s)

    def wait(self, what: str, condition: Callable[[], T], timeout_s: float) -> T:
        try:
            return wait_for(what, condition, timeout_s, lambda: self.daemon is not None and self.daemon.poll() is not None)
        except BenchError as error:
            raise BenchError(f"{error}\n{self.log()[-2000:]}") from None

    # The end.

    def _end_all(self) -> None:
        processes.end(processes.marked(MARK, str(self.root)))
        if self.daemon is not None:
            self.daemon.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.close()


def wait_for(what: str, condition: Callable[[], T], timeout_s: float, is_over: Callable[[], bool] = lambda: False) -> T:
    """The first true value. Looks every 5 ms: what is timed is timed by others (stamps, arrival of messages)."""
    deadline = time.monotonic() + timeout_s
    while True:
        over = is_over()
        if value := condition():
            return value
        if over or time.monotonic() > deadline:
            raise BenchError(f"never came: {what}")
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def install_stub(engines: Path) -> None:
    """As `vllmctl engine install` leaves an engine: a directory, its record, and the link `current`."""
    program = engines / "vllm-0.32.0-bench/bin/vllm"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable} -IS\n{STUB.read_text()}")
    program.chmod(0o755)
    record.write(program.parent.parent, record.Record("0.32.0", "cpu", FLAGS, FLAGS[:1]))
    (engines / record.CURRENT).symlink_to("vllm-0.32.0-bench")
