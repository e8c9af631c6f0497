"""What runs the guides: their own blocks, word for word, on a host without a network but for a hub of our own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.hub import FakeHub
from tests.system.container import Container
from tests.system.host import Host
from tests.system.network import network_of
from tests.system.tree import debian_tree

GUIDES = Path(__file__).parents[2] / "docs/guides"
BLOCK = re.compile(r"^```(\w+)( \w+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""`sh new`: on the other host; what other words mean, the test of that guide says."""
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


def blocks(guide: str, where: str = "", language: str = "sh") -> list[str]:
    found = BLOCK.findall((GUIDES / guide).read_text(encoding="utf-8"))
    return [text for kind, place, text in found if (kind, place.strip()) == (language, where)]


@dataclass
class World:
    """What the guides find on a host: the package in root's directory, pip configured, and a hub."""

    release: str
    binds: dict[str, Path]
    package: str
    model: Path

    @contextmanager
    def host(self) -> Iterator[Host]:
        with Container(debian_tree(self.release), self.binds) as container:
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


def followed(host: Host, commands: list[str], endpoint: str = "", **env: str) -> str:
    """What the last block printed. `endpoint` is of the hub, which stands in the host's configuration once there is one."""
    said = ""
    for command in commands:
        done = host.run("bash", "-ec", f"cd /root\n{command}", env={"DEBIAN_FRONTEND": "noninteractive", **env}, timeout_s=300, check=False)
        assert done.status == 0, f"{command}{done.out}{done.err}\n{host.log('*')}"
        said = done.out
        if endpoint and "apt-get" in command:
            host.container.write("/etc/vllmd/vllmd.yaml", json.dumps({"model": {"hf_endpoint": endpoint}}))
    return said


def serving(host: Host, name: str) -> str:
    text = host.unit(name)["StatusText"]
    assert text.startswith("Serving "), text
    return text


