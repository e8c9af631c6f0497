"""`vllmctl store` by root, in the store of somebody else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import publishing
from tests.component.store.stores import (
    Run,
    give,
    let_in,
)
from tests.needs import need

pytestmark = pytest.mark.component


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("pin", "acme/Tiny"), ".pins"),
        (("rm", "acme/Tiny", "--yes"), ".published"),
        (("gc", "--keep", "1"), ".published"),
        (("import", "../model.tar"), ".staging"),
    ],
)
def test_root_has_no_more_rights_in_a_store_than_its_owner(ctl: Run, store: Path, tmp_path: Path, arguments: tuple[str, ...], place: str) -> None:
    """The owner could put a link into the way of each change: it must not lead to what only root may write."""
    need(os.geteuid() == 0, "root")
    for number in (1, 2):
        publishing.publish_version(store, number, keep=9)
    archive = store.parent / "model.tar"
    assert ctl("export", "acme/Tiny", "--as", "acme/Copy", "-o", str(archive)).returncode == 0
    let_in(tmp_path)
    (store / place).mkdir(exist_ok=True)
    give(store)
    for path in ((store / place), *(store / place).rglob("*")):
        os.chown(path, 0, 0, follow_symlinks=False)
    before = sorted(store.rglob("*.safetensors"))
    refused = ctl(*(str(archive) if each.endswith(".tar") else each for each in arguments))
    assert refused.returncode == 77, refused.stderr
    assert "Traceback" not in refused.stderr
    assert sorted(store.rglob("*.safetensors")) == before


def test_root_leaves_nothing_that_the_owner_of_the_store_cannot_write(ctl: Run, store: Path, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "root")
    let_in(tmp_path)
    for number in (1, 2, 3):
        publishing.publish_version(store, number, keep=9)
    give(store)
    archive = store.parent / "model.tar"
    for arguments in (("pin", "acme/Tiny"), ("gc", "--keep", "2"), ("export", "acme/Tiny", "--as", "acme/Copy", "-o", str(archive)), ("import", str(archive))):
        assert ctl(*arguments).returncode == 0
    [damaged_file] = list(store.glob("acme-Copy.*/model.safetensors"))
    damaged_file.chmod(0o644)
    with damaged_file.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert ctl("verify", "acme/Copy").returncode == 65
    assert [str(path) for path in (store, *store.rglob("*")) if path.lstat().st_uid != 65534] == []
