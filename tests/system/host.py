"""A container as the operator of a vllmd host sees it: instances, their units, the journal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from tests.system.container import Container, Done, wait_for

FAKE_ENGINE = "/mnt/checkout/tests/fakes/engine.py"
MODEL = "/var/lib/vllmd/models/demo"
_ports = count(18000)


@dataclass(frozen=True, slots=True)
class Unit:
    """The properties of a unit that tests ask for, as text."""

    values: Mapping[str, str]

    def __getitem__(self, key: str) -> str:
        return self.values[key]

    @property
    def main_pid(self) -> int:
        return int(self["MainPID"])

    @property
    def status(self) -> tuple[str, int]:
        """Why it ended: the result and the main process's exit status."""
        return self["Result"], int(self["ExecMainStatus"])


class Host:
    def __init__(self, container: Container) -> None:
        self.container = container
        self.run = container.run
        self._names: list[str] = []
        self._cursor = ""

    def install(self, *arguments: str, check: bool = True, **environment: str) -> Done:
        """tools/install.sh, without network."""
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/mnt/wheels", "VLLMD_INSTALL_ENGINE": "no"}
        return self.run("/mnt/checkout/tools/install.sh", *arguments, timeout_s=300, env=offline | environment, check=check)

    # -- instances

    def instance(self, name: str, *, env: Mapping[str, object] | None = None, dropin: str = "", **sections: Any) -> str:
        """Writes /etc/vllmd/NAME.yaml (JSON is YAML): the fake engine, in the modes that `env` names, on a port of its own."""
        self._names.append(name)
        config: dict[str, Any] = {
            "model": MODEL,
            "serve": {"port": next(_ports)},
            "engine": {"executable": FAKE_ENGINE, "env": {key: str(value) for key, value in (env or {}).items()}},
        }
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) and isinstance(config.get(section, {}), dict) else values
        self.container.write(f"/etc/vllmd/{name}.yaml", json.dumps(config, indent=1))
        if dropin:
            self.container.write(f"/etc/systemd/system/vllmd@{name}.service.d/test.conf", f"[Service]\n{dropin}\n")
            self.run("systemctl", "daemon-reload")
        return name

    def port(self, name: str) -> int:
        return int(json.loads(self.container.path(f"/etc/vllmd/{name}.yaml").read_text())["serve"]["port"])

    def start(self, name: str, *, check: bool = True, timeout_s: float = 60) -> Done:
        """Blocks until READY, as `systemctl start` does; a failure says what the journal says."""
        done = self.run("systemctl", "start", f"vllmd@{name}", check=False, timeout_s=timeout_s)
        if check and done.status != 0:
            raise AssertionError(f"{name} did not start: {done.err}\n{self.log(name)}")
        return done

    def stop(self, name: str) -> None:
        self.run("systemctl", "stop", f"vllmd@{name}")

    def unit(self, name: str) -> Unit:
        shown = self.run("systemctl", "show", f"vllmd@{name}").out
        return Unit(dict(line.partition("=")[::2] for line in shown.splitlines()))

    def wait_unit(self, name: str, timeout_s: float, **wanted: str) -> Unit:
        """Waits until the unit's properties are these."""

        def look() -> Unit | None:
            unit = self.unit(name)
            return unit if all(unit[key] == value for key, value in wanted.items()) else None

        try:
            return wait_for(look, timeout_s, f"{name} with {wanted}", 0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.run('systemctl', 'status', f'vllmd@{name}', check=False).out}\n{self.log(name)}") from None

    def state(self, name: str, which: str = "status") -> dict[str, Any]:
        """status.json, or last.json."""
        place = {"status": f"/run/vllmd/i/{name}/status.json", "last": f"/var/lib/vllmd/instances/{name}/last.json"}[which]
        value = json.loads(self.container.path(place).read_text())
        assert isinstance(value, dict)
        return value

    def engine(self, name: str) -> dict[int, str]:
        """The processes of its unit that are not its supervisor."""
        main = self.unit(name).main_pid
        pids = {pid: line for pid, line in self.container.processes("vllmd").items() if pid != main}
        return {pid: line for pid, line in pids.items() if f"vllmd@{name}.service" in self._cgroup(pid)}

    def _cgroup(self, pid: int) -> str:
        try:
            return self.container.path(f"/proc/{pid}/cgroup").read_text()
        except OSError:
            return ""

    def health(self, name: str) -> int:
        """The engine's own answer to GET /health; 0 when nobody answers."""
        code = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).status)"
        done = self.run("python3", "-c", code, f"http://127.0.0.1:{self.port(name)}/health", check=False)
        return int(done.out) if done.status == 0 else 0

    # -- the journal

    def log(self, name: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "short-monotonic", "-n", "80", "-u", f"vllmd@{name}", check=False).out

    def entries(self, name: str) -> list[dict[str, Any]]:
        """The journal's entries of an instance, with every field."""
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "-o", "json", "--all", f"VLLMD_INSTANCE={name}").out.splitlines()
        return [json.loads(line) for line in lines]

    def shell(self, script: str, **more: Any) -> Done:
        return self.run("sh", "-ec", script, **more)

    # -- between tests

    def begin(self) -> None:
        self._names = []

    def clean(self) -> None:
        """Stops and forgets the test's instances; fails if any process of theirs is left."""
        for name in dict.fromkeys(self._names):
            quoted = shlex.quote(f"vllmd@{name}.service")
            places = f"/etc/vllmd/{name}.yaml /etc/vllmd/{name}.d /etc/systemd/system/vllmd@{name}.service.d /var/lib/vllmd/instances/{name} /etc/vllmd/.generations/{name}"
            self.shell(f"systemctl stop {quoted} || :; systemctl reset-failed {quoted} 2>/dev/null || :; rm -rf {places}", timeout_s=120)
        self.run("systemctl", "daemon-reload")
        assert self.container.processes("vllmd") == {}
