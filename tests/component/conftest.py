"""What several component tests stand on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cgroups import ServiceCgroup
from tests.component.downloads import Ran
from tests.component.hostile import Bucket, World, hub_world, s3_world
from tests.fakes.hub import FakeHub
from tests.fakes.nvml import Stub
from tests.fakes.s3_server import S3Server
from vllmd.models.transfer import tls


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The driver, for children of this process."""
    made = Stub(tmp_path)
    for name, value in made.environ().items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def ran(tmp_path: Path) -> Ran:
    """Downloads into a stage below the test's directory."""
    return Ran(tmp_path)


@pytest.fixture
def service() -> Iterator[ServiceCgroup]:
    group = ServiceCgroup()
    yield group
    group.remove()


SPOKEN = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "AWS_", "R2_", "VLLM")


@pytest.fixture
def bare_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home, and an environment that tells sources nothing."""
    for name in list(os.environ):
        if name.startswith(SPOKEN) or name.lower().endswith("_proxy") or name in ("CREDENTIALS_DIRECTORY", *tls.BUNDLES):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def stall_s(request: pytest.FixtureRequest) -> float:
    """STALL_S of the module; where nothing is meant to stall, longer than a busy machine stands still."""
    return float(getattr(request.module, "STALL_S", 5))


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest) -> Iterator[tuple[World, FakeHub]]:
    with hub_world(fetch_stall_s=stall_s(request)) as (made, hub):
        made.publish_good()
        yield made, hub


@pytest.fixture(scope="module")
def bucketed(request: pytest.FixtureRequest) -> Iterator[tuple[World, Bucket, S3Server]]:
    with s3_world(fetch_stall_s=stall_s(request)) as (made, bucket, server):
        made.publish_good()
        yield made, bucket, server
