"""The guides, word for word: their own blocks are run, in an empty Debian without a network but for a hub of our own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
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
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


def blocks(guide: str) -> list[str]:
    return BLOCK.findall((GUIDES / guide).read_text(encoding="utf-8"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize("release", SUITES)
def test_the_first_hour_from_nothing_to_an_answer(release: str, staged: Path, packages: Path, tmp_path: Path, disk: Path) -> None:
    wheels, model = tmp_path / "wheels", demo.make(tmp_path / "model")
    wheels.mkdir()
    engine_wheels(wheels, "0.32.0", FAKE_ENGINE)
    commands = blocks("first-hour.md")
    assert len(commands) <= COMMANDS_MAX
    package = sorted(packages.glob("vllmd_*_amd64.deb"))[0]
    with Container(debian_tree(release), {"/mnt/checkout": staged, "/mnt/packages": packages, "/mnt/wheels": wheels}, disk) as container:
        host = Host(container)
        host.shell(f"cp /mnt/packages/{package.name} /root/")
        container.write("/etc/pip.conf", "[global]\nno-index = true\nfind-links = /mnt/wheels\n")
        container.write("/usr/local/bin/curl", CURL)
        host.shell("chmod 755 /usr/local/bin/curl")
        with network_of(container):
            hub = FakeHub({"Qwen/Qwen3-0.6B": model})
        with hub:
            said = ""
            for command in commands:
                said = host.run("bash", "-ec", f"cd /root\n{command}", env={"DEBIAN_FRONTEND": "noninteractive"}, timeout_s=300).out
                if "apt-get" in command:
                    container.write("/etc/vllmd/vllmd.yaml", json.dumps({"model": {"hf_endpoint": hub.url}}))
        assert json.loads(said)["choices"][0]["message"]["content"]
