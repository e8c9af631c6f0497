"""The guides, word for word: their own blocks are run, in an empty Debian without a network but for a hub of our own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine_wheels import engine_wheels
from tests.fakes.hub import FakeHub
from tests.system.container import Container
from tests.system.host import FAKE_ENGINE, Host
from tests.system.network import network_of
from tests.system.tree import SUITES, debian_tree
from vllmd.models import demo

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

GUIDES = Path(__file__).parents[2] / "docs/guides"
BLOCK = re.compile(r"^```sh( new)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""`sh new`: on the other host."""
COMMANDS_MAX = 5
CURL = """#!/usr/bin/python3
import sys, urllib.request as r
words, headers, body, url = sys.argv[1:], {}, None, ""
while words:
    word = words.pop(0)
    if word == "-H":
        name, _, value = words.pop(0).partition(": ")
        headers[name] = value
    elif word == "-d":
        body = words.pop(0).encode()
    elif not word.startswith("-"):
        url = word
print(r.urlopen(r.Request(url, body, headers), timeout=60).read().decode())
"""
"""The smallest Debian has no curl, and no network to get it from."""


def blocks(guide: str, where: str = "") -> list[str]:
    return [commands for place, commands in BLOCK.findall((GUIDES / guide).read_text(encoding="utf-8")) if place.strip() == where]


@dataclass
class World:
    """What the guides find on a host: the package in root's directory, pip configured, and a hub."""

    release: str
    binds: dict[str, Path]
    package: str
    model: Path
    disks: Path

    @contextmanager
    def host(self, name: str) -> Iterator[Host]:
        disk = self.disks / name
        disk.mkdir(parents=True)
        with Container(debian_tree(self.release), self.binds, disk) as container:
            host = Host(container)
            host.shell(f"cp /mnt/packages/{self.package} /root/; cp -r /mnt/wheels /root/wheels")
            container.write("/etc/pip.conf", "[global]\nno-index = true\nfind-links = /mnt/wheels\n")
            container.write("/usr/local/bin/curl", CURL)
            host.shell("chmod 755 /usr/local/bin/curl")
            yield host

    @contextmanager
    def hub(self, host: Host) -> Iterator[FakeHub]:
        with network_of(host.container):
            hub = FakeHub(dict.fromkeys(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"), self.model))
        with hub:
            yield hub


@pytest.fixture
def world(request: pytest.FixtureRequest, staged: Path, packages: Path, tmp_path: Path) -> Iterator[World]:
    wheels, disks = tmp_path / "wheels", tmp_path / "disks"
    wheels.mkdir()
    for version in ("0.32.0", "0.33.0"):
        engine_wheels(wheels, version, FAKE_ENGINE)
    package = sorted(packages.glob("vllmd_*_amd64.deb"))[0].name
    yield World(request.param, {"/mnt/checkout": staged, "/mnt/packages": packages, "/mnt/wheels": wheels}, package, demo.make(tmp_path / "model"), disks)
    shutil.rmtree(disks, ignore_errors=True)


def followed(host: Host, commands: list[str], endpoint: str = "") -> str:
    """What the last block printed. `endpoint` is of the hub, which stands in the host's configuration once there is one."""
    said = ""
    for command in commands:
        done = host.run("bash", "-ec", f"cd /root\n{command}", env={"DEBIAN_FRONTEND": "noninteractive"}, timeout_s=300, check=False)
        assert done.status == 0, f"{command}{done.out}{done.err}\n{host.log('chat')}"
        said = done.out
        if endpoint and "apt-get" in command:
            host.container.write("/etc/vllmd/vllmd.yaml", json.dumps({"model": {"hf_endpoint": endpoint}}))
    return said


def serving(host: Host, name: str) -> str:
    text = host.unit(name)["StatusText"]
    assert text.startswith("Serving "), text
    return text


@pytest.mark.parametrize("world", SUITES, indirect=True)
def test_the_first_hour_from_nothing_to_an_answer(world: World) -> None:
    commands = blocks("first-hour.md")
    assert len(commands) <= COMMANDS_MAX
    with world.host("one") as host, world.hub(host) as hub:
        assert json.loads(followed(host, commands, hub.url))["choices"][0]["message"]["content"]


@pytest.mark.parametrize("world", ["bookworm"], indirect=True)
def test_the_tasks_of_the_day(world: World) -> None:
    with world.host("one") as host, world.hub(host) as hub:
        followed(host, blocks("first-hour.md"), hub.url)
        key = host.run("vllmctl", "api-key", "show", "chat").out
        followed(host, blocks("several-models.md"))
        assert "127.0.0.1:8001" in serving(host, "draft")
        newer, older = blocks("new-engine-version.md")
        followed(host, [newer])
        assert "vllm-0.33.0" in host.state("chat")["engine"]["executable"]
        followed(host, [older])
        assert "vllm-0.32.0" in host.state("chat")["engine"]["executable"]
        plan, change, back = blocks("new-model.md")
        assert host.run("sh", "-c", plan, check=False).status in (0, 3)  # 3: it does not fit beside what else this machine does
        followed(host, [change])
        assert "Qwen3-1.7B" in serving(host, "chat")
        followed(host, [back])
        assert "Qwen3-0.6B" in serving(host, "chat")
        followed(host, blocks("another-host.md"))
        moved = host.container.path("/root")
        for name in ("move.tar", "move.tar.models"):
            host.shell(f"chmod -R a+r /root/{name}")
        with world.host("new") as new:
            for path in moved.glob("move.tar*"):
                target = new.container.path(f"/root/{path.name}")
                shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
            followed(new, blocks("another-host.md", "new"))
            assert "Qwen3-0.6B" in serving(new, "chat")
            assert new.run("vllmctl", "api-key", "show", "chat").out == key
