"""`vllmctl store verify`: every byte against the sums."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import publishing, tiny_models
from tests.component.store.stores import (
    COMMIT,
    Run,
)
from vllmd.core.model import ModelRequest
from vllmd.models import demo
from vllmd.models.lock import DIRECTORY as LOCKS
from vllmd.models.published import damaged

pytestmark = pytest.mark.component


def flip(path: Path) -> None:
    """One bit, as a failing disk would: neither size nor time change."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_whole_version_is_verified_and_the_speed_said(ctl: Run, store: Path) -> None:
    publishing.publish_version(store, 1, size=1_000_000)
    result = ctl("verify", "acme/Tiny")
    assert result.returncode == 0, result.stderr
    assert "5 files, 1.0 MB verified, " in result.stdout
    assert "GB/s" in result.stdout


def test_flipped_bit_is_65_names_the_file_and_marks_the_version(ctl: Run, store: Path) -> None:
    directory = publishing.publish_version(store, 1)
    other = publishing.publish_version(store, 2)
    flip(directory / "model.safetensors")
    result = ctl("verify", "--all")
    assert result.returncode == 65
    assert f"{directory}/model.safetensors" in result.stderr
    assert "BLAKE3" in result.stderr
    assert (set(damaged(directory)), set(damaged(other))) == ({"model.safetensors"}, set())
    flip(directory / "model.safetensors")
    again = ctl("verify", "--all")
    assert again.returncode == 0
    assert "every byte of it is right now" in again.stdout
    assert damaged(directory) == frozenset()


@pytest.mark.parametrize("how", ["missing", "short", "link", "fifo"])
def test_file_that_is_not_what_it_was_is_named(ctl: Run, store: Path, how: str) -> None:
    directory = publishing.publish_version(store, 1)
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    match how:
        case "short":
            path.write_bytes(data[:-1])
        case "link":
            path.symlink_to("/etc/passwd")
        case "fifo":
            os.mkfifo(path)
    result = ctl("verify", "acme/Tiny")
    assert result.returncode == 65
    assert "model.safetensors" in result.stderr
    assert damaged(directory) == {"model.safetensors"}


def test_blobs_of_a_hub_cache_are_verified_by_their_names(ctl: Run, store: Path) -> None:
    import hashlib

    snapshot = tiny_models.snapshot(store / "hub", "org/Cached", COMMIT, main=True)
    link = snapshot / "model-00001-of-00002.safetensors"
    blob = link.resolve()
    good = blob.with_name(hashlib.sha256(blob.read_bytes()).hexdigest())
    blob.rename(good)
    assert "1 file, " in ctl("verify", "org/Cached").stdout
    flip(good)
    result = ctl("verify", "org/Cached")
    assert result.returncode == 65
    assert str(good) in result.stderr
    assert "vllmctl store rm org/Cached" in result.stderr


def test_own_directory_without_sums_says_so(ctl: Run, store: Path) -> None:
    demo.make(store / "Mine")
    assert ctl("verify", "Mine").stdout == "Mine: no sums speak for it\n"
    assert "nothing in" in ctl("verify", "--all").stdout
    assert "nothing in" in ctl("verify").stdout


def test_own_directory_is_verified_by_what_an_earlier_start_saw(ctl: Run, store: Path) -> None:
    from vllmd.config.settings import Model
    from vllmd.core.model import ResolvedModel
    from vllmd.models.verify import verify

    directory = demo.make(store / "Mine")
    asked = ModelRequest("Mine", "", "", "", (), store)
    verify(ResolvedModel("Mine", directory, "local"), asked, Model(verify="sha256"), lambda _progress: None)
    assert "7 files, " in ctl("verify", "Mine").stdout
    flip(directory / "model-00001-of-00002.safetensors")
    assert ctl("verify", "Mine").returncode == 65
    assert (store / LOCKS).exists() is False, "nothing was written for it"
