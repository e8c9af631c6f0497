"""Daemons for the tests of this folder: quick ones, ones with a fault built in, and what must hold when one has ended."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from tests import procs
from tests.harness import MARK, Instance, merged
from tests.notify_socket import Message

QUICK: Mapping[str, Any] = {
    "gpus": "none",
    "watch": {"interval_s": 0.1, "request_timeout_s": 1},
    "stop": {"start_grace_s": 0.3},
}

FAST: Mapping[str, str] = {"FAKE_SPEED": "3", "FAKE_START_S": "0.3"}
"""A start of a tenth of a second, and a stop of as much; all times of the fake are divided by the speed."""


def quick(fake: Mapping[str, str] | None = None, config: Mapping[str, Any] | None = None, **more: Any) -> Instance:
    """An instance without a GPU check, with a watch that looks often, and an engine that is up in a moment."""
    return Instance(fake={**FAST, **(fake or {})}, config=merged(QUICK, config or {}), **more)


class Tampered(Instance):
    """`patch` is Python that the daemon executes before its main; `before` is a command that executes the daemon."""

    patch = ""
    before: tuple[str, ...] = ()

    def command(self, *arguments: str) -> list[str]:
        script = f"{self.patch}\nimport sys; from vllmd.cli import main; sys.exit(main())"
        return [*self.before, sys.executable, "-c", script, "--root", str(self.root), *arguments]

    @classmethod
    def quick(
        cls, patch: str = "", before: tuple[str, ...] = (), fake: Mapping[str, str] | None = None, **config: Any
    ) -> Self:
        made = cls(fake={**FAST, **(fake or {})}, config=merged(QUICK, config))
        made.patch, made.before = patch, before
        return made


_HOLD = """
import sys
if "vllmd.models.fetch" in sys.orig_argv:
    import pathlib, time, vllmd.models.{name} as module
    real = module.{name}
    def held(*arguments):
        while not pathlib.Path({gate!r}).exists():
            time.sleep(0.01)
        return real(*arguments)
    module.{name} = held
"""


def hold(instance: Instance, stage: Literal["resolve", "verify"]) -> Path:
    """The resolver's stage waits from the next start on, until the returned path exists: a model of many gigabytes."""
    site, gate = instance.root / "site", instance.root / "gate"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_HOLD.format(name=stage, gate=str(gate)))
    instance.env["PYTHONPATH"] = str(site)
    return gate


def extends(instance: Instance) -> list[tuple[float, float]]:
    """Each EXTEND_TIMEOUT_USEC=: when it came, and until when it holds (monotonic seconds)."""
    return [
        (message.at, message.at + int(message.get("EXTEND_TIMEOUT_USEC")) / 1e6)
        for message in instance.notify.messages
        if message.get("EXTEND_TIMEOUT_USEC")
    ]


def first(instance: Instance, name: str, value: str = "1") -> Message:
    """The first message with that field, among those that have come."""
    found = [message for message in instance.notify.messages if message.get(name) == value]
    assert found, f"never told: {name}={value}\n{instance.describe()}"
    return found[0]


def stop(instance: Instance, status: int = 0) -> None:
    instance.signal(signal.SIGTERM)
    assert instance.wait_exit() == status, instance.describe()
    assert_nothing_left(instance)


def ends(instance: Instance, status: int, code: str, *, ready: bool) -> dict[str, Any]:
    """The instance ends by itself, says why in all places, and leaves nothing; last.json's error."""
    assert instance.wait_exit() == status, instance.describe()
    last = instance.last_json()
    assert last["status"] == status
    assert last["error"]["code"] == code, last
    assert last["error"]["what"] in instance.log()
    assert ("1" in instance.notify.told("READY")) is ready
    told = instance.notify.told("STATUS")
    assert last["error"]["what"] in told[-1], told
    assert_nothing_left(instance)
    return dict(last["error"])


def assert_nothing_left(instance: Instance) -> None:
    """No process, socket, private file, launch record or control group of an instance that has ended."""
    left = {process.pid: process.cmdline for process in procs.with_environ(MARK, str(instance.root))}
    assert not left, f"{left}\n{instance.describe()}"
    assert instance.engine() == []
    kept = {path.name for path in instance.runtime.iterdir()} if instance.runtime.exists() else set()
    assert kept <= {"lock", "status.json"}, kept
    assert not (instance.state / "launch.json").exists()
    assert list((instance.root / "run/sock").glob("*")) == []
    if instance.cgroup:
        assert instance.cgroup.members() == []
        assert not [group for group in instance.cgroup.groups() if group.name.startswith("engine-")]


def watch_for(seconds: float, instance: Instance, holds: Any) -> None:
    """The condition holds all the while: for what must *not* happen there is no event to wait for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert holds(), instance.describe()
        time.sleep(0.02)
