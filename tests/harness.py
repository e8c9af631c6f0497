"""`vllmd run` as systemd starts it, in a directory of its own: a notify socket that remembers, and an end without leftovers.

    with Instance(fake={"FAKE_START_S": "2"}, config={"start": {"stall_timeout_s": 5}}) as instance:
        instance.wait_ready()
        instance.signal(signal.SIGTERM)
        assert instance.wait_exit() == 0

The root's path is short, since sun_path has 107 bytes. `cgroup=True` puts the daemon into a cgroup of its own that it may
take for delegated by systemd; without, it falls back to finding its processes by their environment.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Any, Self

from tests import procs
from tests.cgroups import ServiceCgroup
from tests.engine.server import UnixConnection
from tests.fakes.fake_engine.arguments import build_parser
from tests.notify_socket import Message, NotifySocket
from tests.ports import free_port
from vllmd.engines import record
from vllmd.models import demo

FAKE = Path(__file__).resolve().parent / "fakes" / "engine.py"
MARK = "TEST_ROOT"
"""In the environment of the daemon and of the engine: whatever carries it is ended with the harness."""
Config = Mapping[str, Any]


def install_fake(engines: Path) -> Path:
    """The fake engine as `vllmctl engine install` leaves an engine, with its flags on record; returns its program.

    A plain `engine.executable:` with the fake's path works too, but then vllmd knows none of its flags, as with any vLLM
    that it has not installed, and leaves out those that not every version has (--shutdown-timeout)."""
    directory = engines / "vllm-0.32.0-fake"
    program = directory / "bin/vllm"
    if not program.exists():
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec {FAKE} "$@"\n')
        program.chmod(0o755)
        record.write(directory, record.Record("0.32.0", "cpu", *flags()))
        (engines / record.CURRENT).symlink_to(directory.name)
    return program


def flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every option of the fake, and those without a value."""
    actions = build_parser()._actions
    names = {name: action.nargs == 0 for action in actions for name in action.option_strings}
    return tuple(sorted(names)), tuple(sorted(name for name, alone in names.items() if alone))


def merged(below: Config, above: Config) -> dict[str, Any]:
    """Mappings are merged, everything else replaced."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def _carry(link: http.client.HTTPConnection, key: str) -> None:
    plain = link.endheaders

    def endheaders(*arguments: Any, **more: Any) -> None:
        link.putheader("Authorization", f"Bearer {key}")
        plain(*arguments, **more)

    link.endheaders = endheaders  # type: ignore[method-assign]


class Instance:
    """One instance and its root. Every method may be called again after `start`: a root outlives its daemons.

    `config` is merged into a configuration that starts `engine` (the fake one, installed in the root) on a tiny model of
    the `task`; `fake` holds FAKE_ modes;
    `env` goes to the daemon; `watchdog_s` sets WATCHDOG_USEC; `root` shares the root of another instance.
    """

    def __init__(
        self,
        name: str = "demo",
        *,
        config: Config | None = None,
        fake: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        engine: Path | None = None,
        task: str = "generate",
        cgroup: bool = False,
        watchdog_s: float = 0.0,
        root: Path | None = None,
    ) -> None:
        procs.adopt_orphans()
        self.name = name
        self.owns_root = root is None
        self.root = root or Path(tempfile.mkdtemp(prefix="v-"))
        self.port = free_port()
        model = self.root / f"model-{task}"
        if not model.exists():
            demo.make(model, task)
        (self.root / "etc").mkdir(exist_ok=True)
        self.config = merged(self._defaults(engine or install_fake(self.root / "engines"), model, fake or {}), config or {})
        self.write_config()
        self.cgroup = ServiceCgroup() if cgroup else None
        self.notify = NotifySocket(self.root / f"{name}.notify")
        self.env = {"PATH": os.environ["PATH"], "HOME": str(self.root), "LANG": "C.UTF-8", MARK: str(self.root), **(env or {})}
        self.env["NOTIFY_SOCKET"] = str(self.notify.path)
        if watchdog_s:
            self.env["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        if cgroup:
            self.env["INVOCATION_ID"] = "0123456789abcdef0123456789abcdef"
        self.daemon: subprocess.Popen[bytes] | None = None
        self._litter: set[Path] = set()

    def _defaults(self, engine: Path, model: Path, fake: Mapping[str, str]) -> dict[str, Any]:
        return {
            "model": {"path": str(model)},
            "serve": {"port": self.port, "served_model_name": "tiny"},
            "engine": {"executable": str(engine), "env": {**fake, MARK: str(self.root), "TMPDIR": str(self.root)}},
        }

    # Files.

    @property
    def runtime(self) -> Path:
        return self.root / "run/i" / self.name

    @property
    def state(self) -> Path:
        return self.root / "lib/instances" / self.name

    def write_config(self) -> None:
        """JSON is YAML."""
        (self.root / f"etc/{self.name}.yaml").write_text(json.dumps(self.config, indent=1))

    def last_json(self) -> dict[str, Any]:
        return dict(json.loads((self.state / "last.json").read_text()))

    def launch_json(self) -> dict[str, Any]:
        return dict(json.loads((self.state / "launch.json").read_text()))

    def status_json(self) -> dict[str, Any]:
        return dict(json.loads((self.runtime / "status.json").read_text()))

    def log(self) -> str:
        """What daemon and engine wrote to stderr and stdout, all starts one after another."""
        return "".join(path.read_text(errors="replace") for path in (self.root / f"{self.name}.out", self.root / f"{self.name}.err"))

    def control(self, path: str) -> tuple[int, str]:
        """GET on control.sock: (status, body)."""
        connection = UnixConnection(str(self.runtime / "control.sock"), timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def status(self) -> dict[str, Any]:
        code, body = self.control("/status")
        assert code == 200, body
        return dict(json.loads(body))

    # The daemon.

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "vllmd.cli", "--root", str(self.root), *arguments]

    def start(self, *arguments: str) -> Self:
        """Start the daemon (again); what earlier ones told is forgotten."""
        assert self.daemon is None or self.daemon.poll() is not None, "it runs"
        self.notify.forget()
        argv = self.command("run", self.name, *arguments)
        if self.cgroup:
            argv = self.cgroup.enter(argv)
        with (self.root / f"{self.name}.out").open("ab") as out, (self.root / f"{self.name}.err").open("ab") as err:
            self.daemon = subprocess.Popen(
                argv, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        return self

    @property
    def pid(self) -> int:
        assert self.daemon is not None
        return self.daemon.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_exit(self, timeout_s: float = 60.0) -> int:
        assert self.daemon is not None
        try:
            status = self.daemon.wait(timeout_s)
            procs.reap_adopted()
            return status
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s\n{self.describe()}") from None

    def wait_notify(self, predicate: Callable[[Message], bool], timeout_s: float = 30.0) -> Message:
        """The first message, also an earlier one, for which the predicate holds; fails at once when the daemon ends."""
        found = self.notify.wait(predicate, timeout_s, lambda: self.daemon is not None and self.daemon.poll() is not None)
        assert found is not None, f"no such message\n{self.describe()}"
        return found

    def wait_ready(self, timeout_s: float = 60.0) -> Message:
        ready = self.wait_notify(lambda message: message.get("READY") == "1", timeout_s)
        self._litter |= set().union(*map(procs.shared_memory_of, self.engine_pids()))
        return ready

    def wait_state(self, state: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Until status.json says so."""

        def document() -> dict[str, Any]:
            with contextlib.suppress(OSError, ValueError):
                found = self.status_json()
                return found if found.get("state") == state else {}
            return {}

        try:
            return procs.wait_until(f"state {state}", document, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe()}") from None

    def describe(self) -> str:
        last = self.state / "last.json"
        told = [dict(message.fields) for message in self.notify.messages[-15:]]
        exit_status = self.daemon.poll() if self.daemon else None
        return f"exit: {exit_status}\nlast: {last.read_text() if last.exists() else None}\ntold: {told}\nlog:\n{self.log()[-4000:]}"

    # The engine.

    def engine(self) -> list[procs.Process]:
        """The engine's living processes: those that carry its launch id, or lie in a group engine-*; not the daemon's own."""
        inside = self.cgroup.members("engine-") if self.cgroup else []
        found = [process for process in self._marked() if process.pid in inside or procs.environ_of(process.pid).get("VLLMD_LAUNCH_ID")]
        known = {process.pid for process in found}
        return found + [process for pid in inside if pid not in known and (process := procs.read(pid))]

    def engine_pids(self) -> list[int]:
        return [process.pid for process in self.engine()]

    def engine_process(self, comm: str) -> procs.Process:
        """The one engine process of that name ('VLLM::EngineCore', 'VLLM::Worker'), or the one that was executed ('main')."""
        main = self.launch_json()["pid"] if comm == "main" else 0
        found = [process for process in self.engine() if process.comm == comm[:15] or process.pid == main]
        assert len(found) == 1, f"{len(found)} {comm} among {[process.comm for process in self.engine()]}"
        return found[0]

    def kill_engine(self, comm: str, number: int = SIGKILL) -> None:
        os.kill(self.engine_process(comm).pid, number)

    def key(self) -> str:
        """The key that the first start made; '' where there is none."""
        try:
            return str(json.loads((self.root / f"lib/public/{self.name}/credentials.json").read_text())["apiKey"])
        except FileNotFoundError:
            return ""

    def ask(self, path: str, body: Any = None, *, key: str | None = None, timeout_s: float = 30.0) -> tuple[int, str]:
        """The engine's own HTTP: (status, body). `key`: '' for none; by default the one that dependents read."""
        with contextlib.closing(self.connection(timeout_s, key=key)) as connection:
            headers = {"content-type": "application/json"}
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")

    def connection(self, timeout_s: float = 30.0, *, key: str | None = None) -> http.client.HTTPConnection:
        """With the key on each of its requests."""
        key = self.key() if key is None else key
        if self.config["serve"].get("listen") == "uds":
            link: http.client.HTTPConnection = UnixConnection(str(self.root / f"run/sock/{self.name}.sock"), timeout_s)
        else:
            link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        if key:
            _carry(link, key)
        return link

    def _marked(self) -> list[procs.Process]:
        return procs.with_environ(MARK, str(self.root))

    # The end.

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            sys.stderr.write(self.describe())
        self.close()

    def close(self) -> None:
        """Ends everything by SIGKILL: daemon, engine, strays; removes the root and the cgroup."""
        left = {process.pid for process in self._marked()} if self.owns_root else set()
        if self.daemon:
            left |= {process.pid for process in procs.in_session(self.daemon.pid)}
        if self.cgroup:
            left |= set(self.cgroup.members())
        procs.kill_all(left)
        if self.daemon:
            self.daemon.wait(10)
        procs.reap_adopted()
        for block in self._litter:
            block.unlink(missing_ok=True)
        if self.cgroup:
            self.cgroup.remove()
        self.notify.close()
        if self.owns_root:
            shutil.rmtree(self.root)
