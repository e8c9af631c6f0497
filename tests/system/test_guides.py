"""The guides for the first hour and for the tasks of the day, word for word, on Debians on which nothing is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine_wheels import engine_wheels, wheel
from tests.system.guides import World, blocks, followed, serving
from tests.system.host import FAKE_ENGINE, Host
from tests.system.tree import SUITES
from vllmd.models import demo

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

COMMANDS_MAX = 5


@pytest.fixture
def world(request: pytest.FixtureRequest, staged: Path, packages: Path, tmp_path: Path) -> World:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("0.32.0", "0.33.0"):
        engine_wheels(wheels, version, FAKE_ENGINE)
    wheel(wheels, "py_spy", "0.4", {})
    package = sorted(packages.glob("vllmd_*_amd64.deb"))[0].name
    return World(request.param, {"/mnt/checkout": staged, "/mnt/packages": packages, "/mnt/wheels": wheels}, package, demo.make(tmp_path / "model"))


@pytest.mark.parametrize("world", SUITES, indirect=True)
def test_the_first_hour_from_nothing_to_an_answer(world: World) -> None:
    commands = blocks("first-hour.md")
    assert len(commands) <= COMMANDS_MAX
    with world.host() as host, world.hub(host) as hub:
        assert json.loads(followed(host, commands, hub.url))["choices"][0]["message"]["content"]


@pytest.mark.parametrize("world", ["bookworm"], indirect=True)
def test_the_tasks_of_the_day(world: World) -> None:
    with world.host() as host, world.hub(host) as hub:
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
        followed(host, blocks("air-gap.md"))
        with world.host() as new:
            carry(host, new, "move.tar", "move.tar.models")
            followed(new, blocks("another-host.md", "new"))
            assert "Qwen3-0.6B" in serving(new, "chat")
            assert new.run("vllmctl", "api-key", "show", "chat").out == key
        with world.host() as sealed:
            sealed.shell("rm -r /root/wheels /etc/pip.conf; mkdir /root/wheels")
            carry(host, sealed, "carry/wheels", "carry/qwen3.tar")
            followed(sealed, blocks("air-gap.md", "new"))
            assert "Qwen3-0.6B" in serving(sealed, "chat")


def carry(here: Host, there: Host, *names: str) -> None:
    """As a person would, from /root to /root."""
    here.shell("".join(f"chmod -R a+r /root/{name};" for name in names))
    for name in names:
        source, target = here.container.path(f"/root/{name}"), there.container.path(f"/root/{name.rpartition('/')[2]}")
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, target)
