"""What several component tests stand on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cgroups import ServiceCgroup
from tests.component.hostile import Bucket, World, hub_world, s3_world
from tests.fakes.hub import FakeHub
from tests.fakes.nvml import Stub
from tests.fakes.s3_server import S3Server


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The driver, for children of this process."""
    made = Stub(tmp_path)
    for name, value in made.environ().items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def service() -> Iterator[ServiceCgroup]:
    group = ServiceCgroup()
    yield group
    group.remove()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[World, FakeHub]]:
    with hub_world() as (made, hub):
        made.publish_good()
        yield made, hub


@pytest.fixture(scope="module")
def bucketed() -> Iterator[tuple[World, Bucket, S3Server]]:
    with s3_world() as (made, bucket, server):
        made.publish_good()
        yield made, bucket, server
