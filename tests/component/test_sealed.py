"""A published version was validated before it was complete: what nobody touched since is not read again, what somebody touched is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import publishing, tiny_models
from vllmd.config.settings import Model
from vllmd.core.model import ResolvedModel
from vllmd.errors import ModelInvalid
from vllmd.models import contents as manifests
from vllmd.models import safetensors
from vllmd.models.published import sealed_ns
from vllmd.models.resolve import resolve

pytestmark = pytest.mark.component

WEIGHTS = "model.safetensors"


def resolved(store: Path) -> ResolvedModel:
    return resolve(tiny_models.request(store), Model(), {}, lambda _: None)


def until_later(than_ns: int, probe: Path) -> None:
    """Files get their times from a clock of some milliseconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        probe.write_text("")
        if probe.stat().st_mtime_ns > than_ns:
            return
        time.sleep(0.001)
    raise AssertionError("the clock of the file system stands")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A version, some time after it was published."""
    directory = publishing.publish_version(tmp_path / "store", 1, tell=lambda _: None)
    assert max(path.stat().st_ctime_ns for path in directory.iterdir()) <= (directory / manifests.FILE).stat().st_ctime_ns
    until_later(max(path.stat().st_ctime_ns for path in directory.iterdir()), tmp_path / "probe")
    os.utime(directory / manifests.FILE)
    until_later(sealed_ns(directory), tmp_path / "probe")
    return directory


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The headers that are read."""
    names: list[str] = []
    check = safetensors.check

    def noted(directory: Path, name: str) -> None:
        names.append(name)
        check(directory, name)

    monkeypatch.setattr(safetensors, "check", noted)
    return names


def test_headers_that_nobody_touched_are_not_read_again(sealed: Path, read: list[str], tmp_path: Path) -> None:
    assert resolved(tmp_path / "store").directory == sealed
    assert read == []


@pytest.mark.parametrize("touch", [Path.touch, lambda path: path.chmod(0o600), lambda path: os.link(path, path.parent.parent / "shared")])
def test_headers_of_what_was_touched_are(sealed: Path, read: list[str], tmp_path: Path, touch: Callable[[Path], None]) -> None:
    touch(sealed / WEIGHTS)
    assert resolved(tmp_path / "store").directory == sealed
    assert read == [WEIGHTS]


def test_a_damaged_header_is_found_though_its_time_and_size_were_put_back(sealed: Path, tmp_path: Path) -> None:
    path = sealed / WEIGHTS
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"\xff" * 8)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ModelInvalid, match="its header claims"):
        resolved(tmp_path / "store")


def test_without_a_manifest_everything_is_read(sealed: Path, read: list[str], tmp_path: Path) -> None:
    (sealed / manifests.FILE).write_text("{}")
    assert resolved(tmp_path / "store").directory == sealed
    assert read == [WEIGHTS]
