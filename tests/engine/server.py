"""One engine, fake or real, started as a person would: no supervisor between. For the contract that both keep."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import procs
from tests.ports import free_port

KEY = "sk-contract-7f3a"
NAME = "tiny"
REAL_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Kind:
    """How to start one of the two. `start_s` bounds a start; `tokens` makes a stream of a few seconds, `ENDLESS` one that
    nobody waits for."""

    name: str
    executable: Path
    models: Path
    start_s: float
    tokens: int
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


ENDLESS = 30_000


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class EngineServer:
    """A process in a session of its own, its output in files. `close` ends all of it, whatever state it is in."""

    def __init__(self, kind: Kind, *flags: str, model: str = "generate", uds: str = "", port: int = 0) -> None:
        procs.adopt_orphans()
        self.kind, self.uds = kind, uds
        self.port = port or free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="ve-"))
        self.litter: set[Path] = set()
        config = self.folder / "config.yaml"
        config.write_text(f"api-key:\n- {KEY}\n")
        config.chmod(0o600)
        directory = str(kind.models / model) if "/" not in model else model
        where = ["--uds", uds] if uds else ["--host", "127.0.0.1", "--port", str(self.port)]
        argv = [str(kind.executable), "serve", directory, *where, "--served-model-name", NAME, "--config", str(config)]
        env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "TMPDIR": str(self.folder), **kind.env}
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            self.process = subprocess.Popen(
                [*argv, *kind.flags, *flags], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return "".join((self.folder / name).read_text(errors="replace") for name in ("out", "err"))

    def members(self) -> list[procs.Process]:
        return procs.in_session(self.pid)

    def member(self, comm: str) -> procs.Process:
        found = [process for process in self.members() if process.comm == comm[:15]]
        assert len(found) == 1, f"{len(found)} {comm} among {[process.comm for process in self.members()]}"
        return found[0]

    def wait_ready(self) -> None:
        procs.wait_until("200 on /health", self._healthy, self.kind.start_s, 0.05)
        self.note_litter()

    def note_litter(self) -> None:
        """Whoever is killed later leaves these."""
        self.litter |= set().union(*(procs.shared_memory_of(process.pid) for process in self.members()))

    def _healthy(self) -> bool:
        assert self.process.poll() is None, f"ended with {self.process.returncode} while starting:\n{self.output()[-3000:]}"
        return self.health() == 200

    def wait_exit(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)

    def wait_empty(self, timeout_s: float = 5.0) -> None:
        """Until the last process of the session is gone."""
        procs.wait_until("an empty session", lambda: not self.members(), timeout_s)
        self.reap()

    def reap(self) -> None:
        """What the API server orphaned has become ours, and a zombie would be taken for a leftover."""
        with contextlib.suppress(ChildProcessError):
            while os.waitid(os.P_PGID, self.pid, os.WEXITED | os.WNOHANG):
                pass

    def close(self) -> None:
        """SIGKILL at once: a server that is asked first could be anything by then."""
        procs.kill_all(process.pid for process in self.members())
        self.process.wait(10)
        self.reap()
        for block in self.litter:
            block.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    # Asking.

    def connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self.uds:
            return UnixConnection(self.uds, timeout_s)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def ask(self, path: str, body: Any = None, *, key: str = KEY, timeout_s: float = 30.0) -> tuple[int, Any]:
        """(status, decoded body); OSError where nobody answers."""
        with contextlib.closing(self.connection(timeout_s)) as connection:
            headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
            data = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, data, headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        with contextlib.suppress(ValueError):
            return answer.status, json.loads(text)
        return answer.status, text

    def health(self) -> int | str:
        """The status, or the name of the error."""
        try:
            return self.ask("/health", timeout_s=5)[0]
        except OSError as error:
            return type(error).__name__

    def metric(self, name: str) -> float:
        """Summed over its labels."""
        lines = str(self.ask("/metrics", key="")[1]).splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        assert values, f"no {name} in /metrics"
        return sum(values)

    @contextlib.contextmanager
    def stream(self, tokens: int) -> Iterator[Iterator[dict[str, Any]]]:
        """A completion in flight: its events one by one, without the final [DONE]."""
        body = {"model": NAME, "prompt": "hi", "max_tokens": tokens, "stream": True, "ignore_eos": True}
        with contextlib.closing(self.connection(60)) as connection:
            headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            with connection.getresponse() as answer:
                assert answer.status == 200
                yield events_of(answer)

    def signal(self, number: signal.Signals, comm: str = "") -> float:
        """To the API server, or to the one process of that name; returns the monotonic time."""
        os.kill(self.member(comm).pid if comm else self.pid, number)
        return time.monotonic()


def events_of(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := answer.readline():
        if line.startswith(b"data: ") and b"[DONE]" not in line:
            yield json.loads(line[6:])


def bound(port: int) -> bool:
    """Whether somebody has the port, listening or not: only an exclusive bind sees a socket that does not listen."""
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
