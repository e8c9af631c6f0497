"""What `make install` places beside the program: the files of the packages, listed for their removal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.package import host, layout
from tools.package.layout import LOCAL, PACKAGE

pytestmark = pytest.mark.unit


def _files(root: Path) -> set[str]:
    return {f"/{path.relative_to(root)}" for path in root.rglob("*") if path.is_file()}


def _listed(listing: Path) -> tuple[list[str], list[str]]:
    names = listing.read_text().splitlines()
    return [name for name in names if not name.endswith("/")], [name for name in names if name.endswith("/")]


def test_a_host_gets_the_files_of_the_packages(tmp_path: Path) -> None:
    layout.write(tmp_path / "package", PACKAGE)
    layout.write_documents(tmp_path / "documents", PACKAGE, 0)
    host.install(tmp_path / "files", tmp_path / "host")
    packed = sorted(Path(name).name for name in _files(tmp_path / "package") | _files(tmp_path / "documents"))
    assert sorted(Path(name).name for name in _files(tmp_path / "host")) == packed
    unit = (tmp_path / "host/usr/local/lib/systemd/system/vllmd@.service").read_text()
    assert f"ExecStart={LOCAL.bin}/vllmd" in unit


def test_the_list_names_what_was_made_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "host/usr/local/share").mkdir(parents=True)
    before = os.umask(0o077)
    try:
        host.install(tmp_path / "files", tmp_path / "host")
    finally:
        os.umask(before)
    files, folders = _listed(tmp_path / "files")
    assert set(files) == _files(tmp_path / "host")
    made = {f"/{path.relative_to(tmp_path / 'host')}/" for path in (tmp_path / "host").rglob("*") if path.is_dir()}
    assert set(folders) == made - {"/usr/", "/usr/local/", "/usr/local/share/"}
    for name in files:
        (tmp_path / "host" / name[1:]).unlink()
    for name in folders:
        assert (tmp_path / "host" / name[1:]).stat().st_mode & 0o777 == 0o755
        (tmp_path / "host" / name[1:]).rmdir()


def test_another_version_takes_along_what_only_the_one_before_had(tmp_path: Path) -> None:
    old, own = tmp_path / "host/usr/local/share/vllmd/old.yaml", tmp_path / "host/usr/local/share/vllmd/own.yaml"
    old.parent.mkdir(parents=True)
    old.write_text("")
    own.write_text("")
    (tmp_path / "files").write_text("/usr/local/share/vllmd/old.yaml\n/usr/local/share/vllmd/\n")
    host.install(tmp_path / "files", tmp_path / "host")
    assert (old.exists(), own.exists()) == (False, True)
    files, folders = _listed(tmp_path / "files")
    assert "/usr/local/share/vllmd/old.yaml" not in files
    assert "/usr/local/share/vllmd/" in folders, "of the first installation, and still to be removed"
    assert set(files) | {"/usr/local/share/vllmd/own.yaml"} == _files(tmp_path / "host")
