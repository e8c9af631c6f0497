"""What an administrator's store meets: another user's directories in it, odd umasks, things in the way. Nothing is written outside,
and what is wrong is said before a byte is fetched."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.hub import Asked, FakeHub, Reply
from vllmd.config.paths import root_paths
from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest, ResolvedModel
from vllmd.ctl import store as ctl_store
from vllmd.errors import ModelInvalid, PermissionMissing, TryLater, VllmdError
from vllmd.models import demo
from vllmd.models.identity import label
from vllmd.models.lock import private_directory
from vllmd.models.resolve import resolve

pytestmark = pytest.mark.component

STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's files")
Script = Callable[[Asked], Reply | None]


def asked(store: Path) -> ModelRequest:
    return ModelRequest("Tiny", "acme/Tiny", "", "", ("hf-hub",), store)


def fetch(store: Path, hub: FakeHub, **settings: object) -> ResolvedModel:
    model = Model(name="Tiny", org="acme", hf_endpoint=hub.url, source_timeout_s=0, **settings)  # type: ignore[arg-type]
    return resolve(asked(store), model, {}, lambda _progress: None)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return demo.make(tmp_path / "model")


def test_what_is_published_can_be_read_whatever_the_umask_is(store: Path, model: Path) -> None:
    before = os.umask(0o077)
    try:
        with FakeHub({"acme/Tiny": model}) as hub:
            served = fetch(store, hub).directory
    finally:
        os.umask(before)
    for directory in (served, served.parent, served.parent.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755, directory


@as_root
def test_what_a_stranger_planted_is_not_written_through(store: Path, model: Path, tmp_path: Path) -> None:
    """The owner of a directory may replace what is in it at any moment: here, when the first file is asked for."""
    outside = tmp_path / "outside"
    outside.mkdir()
    staging = store / ".staging"
    staging.mkdir()
    os.chown(staging, STRANGER, STRANGER)

    def swap(asked: Asked) -> Reply | None:
        parts = staging / label(ModelRequest("Tiny", "acme/Tiny", "", "", (), store)) / "parts"
        if "/resolve/" in asked.path and parts.is_dir() and not parts.is_symlink():
            shutil.rmtree(parts)
            parts.symlink_to(outside)
        return None

    with FakeHub({"acme/Tiny": model}, script=swap) as hub, pytest.raises(PermissionMissing) as caught:
        fetch(store, hub)
    assert str(staging) in caught.value.what
    assert str(STRANGER) in caught.value.what
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "fifo", "link"])
@pytest.mark.parametrize("name", [".staging", ".published", f".published/{label(asked(Path()))}"])
def test_what_is_in_the_way_is_named_before_the_first_byte(name: str, kind: str, store: Path, model: Path, tmp_path: Path) -> None:
    place = store / name
    place.parent.mkdir(exist_ok=True)
    if kind == "file":
        place.write_text("")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path)
    with FakeHub({"acme/Tiny": model}) as hub:
        with pytest.raises(VllmdError) as caught:
            fetch(store, hub)
        assert not [each for each in hub.asked if "/resolve/" in each.path]
    assert caught.value.what.startswith(f"{place}: ")
    assert "lock" not in caught.value.what
    assert str(place) in caught.value.hint


@as_root
def test_directory_of_the_stores_owner_is_as_good_as_our_own(store: Path) -> None:
    (store / ".pins").mkdir()
    for path in (store, store / ".pins"):
        os.chown(path, STRANGER, STRANGER)
    assert private_directory(store, ".pins") == store / ".pins"


def test_pickle_weights_are_refused_before_they_are_fetched(store: Path, model: Path) -> None:
    config = {path.name: path.read_bytes() for path in model.iterdir() if "safetensors" not in path.name}
    with FakeHub({"acme/Tiny": {**config, "pytorch_model.bin": b"PK\3\4" + bytes(1000)}}) as hub:
        with pytest.raises(ModelInvalid, match="pickle") as caught:
            fetch(store, hub)
        assert not [each for each in hub.asked if "/resolve/" in each.path]
        assert "model.allow_pickle" in caught.value.hint
        assert fetch(store, hub, allow_pickle=True, skip_integrity_check=True).via == "hf-hub"


def test_nobody_is_told_to_stop_an_instance_that_is_none(store: Path, model: Path, tmp_path: Path) -> None:
    """A resolution by hand, an export, an import hold a model too."""
    with FakeHub({"acme/Tiny": model}) as hub:
        served = fetch(store, hub).directory
    command = [sys.executable, "-c", f"from vllmd.models.store import hold; from pathlib import Path\nwith hold(Path({str(served)!r})): print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as user:
        assert user.stdout
        user.stdout.readline()
        with pytest.raises(TryLater) as caught:
            ctl_store.main(["rm", "acme/Tiny", "--yes", "--dir", str(store)], root_paths(tmp_path / "root"))
        user.communicate(b"\n", timeout=20)
    assert f"pid {user.pid}" in caught.value.what
    assert "vllmctl stop" not in caught.value.hint
    assert served.is_dir()
