"""One container for all tests that do no harm to it: the project installed by tools/install.sh, without network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs import need
from tests.system.container import Container, cgroup2_mount, own_cgroup
from tests.system.host import FAKE_ENGINE, Host
from tests.system.tree import CHECKOUT, debian_tree, wheelhouse
from tools.package.__main__ import Build, build

_PARTS = ("vllmd", "units", "etc", "share", "docs", "tools", "tests/fakes", "pyproject.toml", "README.md", "LICENSE", "NEWS.md")
EPOCH = 1_750_000_000
_TOOLS = ("debootstrap", "systemd-nspawn", "nsenter", "setpriv", "unshare")


def _need_containers() -> None:
    need(os.geteuid() == 0, "root")
    for tool in _TOOLS:
        need(shutil.which(tool) is not None, tool)
    try:
        place = cgroup2_mount() / own_cgroup()
    except RuntimeError:
        need(False, "a cgroup2 hierarchy")
    need(os.access(place, os.W_OK), "a control group to make others in")


@pytest.fixture(scope="session")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as it is at the start of the tests, readable by everyone: without what is built or local in it."""
    stage = tmp_path_factory.mktemp("checkout")
    for part in _PARTS:
        source = CHECKOUT / part
        if source.is_dir():
            shutil.copytree(source, stage / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, stage / part)
    for path in (stage, *stage.rglob("*")):
        path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    return stage


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of this checkout, and of the same with a higher version."""
    out = tmp_path_factory.mktemp("packages")
    for version in ("0.1.0", "0.1.1"):
        build(Build("amd64", ("deb", "rpm"), version, out, EPOCH))
    out.chmod(0o755)
    return out


@pytest.fixture(scope="session")
def binds(staged: Path) -> dict[str, Path]:
    """What every container sees of this machine, read-only."""
    _need_containers()
    return {"/mnt/checkout": staged, "/mnt/wheels": wheelhouse()}


@pytest.fixture(scope="session")
def machine(binds: dict[str, Path]) -> Iterator[Host]:
    """The shared container, installed."""
    with Container(debian_tree(), binds) as container:
        host = Host(container)
        host.install(VLLMD_ENGINE_EXECUTABLE=FAKE_ENGINE)
        yield host


@pytest.fixture
def host(machine: Host) -> Iterator[Host]:
    """The shared container; whatever the test left of its instances is removed."""
    machine.begin()
    yield machine
    machine.clean()


@pytest.fixture
def bare(binds: dict[str, Path]) -> Iterator[Host]:
    """A container of the test's own, pristine: nothing is installed."""
    with Container(debian_tree(), binds) as container:
        yield Host(container)
