"""What an instance leaves when its configuration is removed, and how it goes: `vllmctl forget NAME`."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import publishing
from tests.needs import need
from vllmd.config.paths import root_paths
from vllmd.instance import keys
from vllmd.models import kept

pytestmark = pytest.mark.component

SERVICE = 54321


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two instances were there; `gone` has no configuration any more."""
    root = tmp_path / "root"
    paths = root_paths(root)
    for name in ("gone", "demo"):
        keys.ensure(paths, name, wanted=True)
        for file in (f"etc/.generations/{name}/{'0' * 64}/{name}.yaml", f"lib/instances/{name}/generations/00001.json", f"lib/instances/{name}/incidents/1/summary.json"):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text("{}")
    (root / "etc/demo.yaml").write_text("model: acme/Tiny\n")
    old, new = (publishing.publish_version(paths.models, number, keep=9) for number in (1, 2))
    assert old != new
    kept.write(paths.models, "gone", [old.name])
    return root


def vllmctl(root: Path, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-c", "import sys; from vllmd.ctl import main; sys.exit(main())", "--root", str(root), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, done.stdout + done.stderr


def of(root: Path, name: str) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if name in path.name)


def test_all_of_it_goes_and_nothing_else(root: Path) -> None:
    others = of(root, "demo")
    assert vllmctl(root, "forget", "gone")[0] == 64  # nobody can be asked
    assert len(of(root, "gone")) == 5
    status, said = vllmctl(root, "forget", "gone", "--yes")
    assert status == 0, said
    assert (of(root, "gone"), of(root, "demo")) == ([], others)
    assert not os.path.lexists(root / "lib/public/credentials.json")
    assert vllmctl(root, "forget", "gone", "--yes") == (0, "nothing is left of gone\n")
    keys.ensure(root_paths(root), "demo", wanted=True)
    assert (root / "lib/public/credentials.json").resolve() == root / "lib/public/demo/credentials.json"


def test_versions_that_it_kept_go_with_the_next_collection_which_says_so_before(root: Path) -> None:
    status, said = vllmctl(root, "store", "gc", "--keep", "1")
    assert status == 0
    assert "kept for a rollback of gone, which has no configuration here" in said
    assert "forget gone" in said
    versions = root / "lib/models/.published"
    assert len(list(versions.glob("*/*"))) == 2
    vllmctl(root, "forget", "gone", "--yes")
    assert "forget" not in vllmctl(root, "store", "gc", "--keep", "1")[1]
    assert len(list(versions.glob("*/*"))) == 1


def test_what_is_configured_or_runs_is_not_forgotten(root: Path) -> None:
    status, said = vllmctl(root, "forget", "demo", "--yes")
    assert (status, "has a configuration" in said) == (64, True)
    (root / "etc/gone.d").mkdir()
    assert vllmctl(root, "forget", "gone", "--yes")[0] == 64
    (root / "etc/gone.d").rmdir()
    (root / "run/i/gone").mkdir(parents=True)
    with open(root / "run/i/gone/lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert vllmctl(root, "forget", "gone", "--yes")[0] == 75
    assert (root / "lib/instances/gone/keys.json").exists()
    assert vllmctl(root, "forget", "../demo", "--yes")[0] == 64


def test_links_of_the_service_lead_root_nowhere(root: Path) -> None:
    need(os.geteuid() == 0, "root")
    for above in root.parents:
        if above != Path("/") and not above.stat().st_mode & 1:
            above.chmod(0o711)
    (root / "mine").mkdir()
    (root / "mine/file").write_text("root's")
    state = root / "lib/instances/gone"
    (state / "incidents/link").symlink_to(root / "mine")
    for folder, _, files in os.walk(root / "lib"):
        os.chown(folder, SERVICE, SERVICE)
        for each in files:
            os.chown(Path(folder, each), SERVICE, SERVICE, follow_symlinks=False)
    assert vllmctl(root, "forget", "gone", "--yes")[0] == 0
    assert (root / "mine/file").exists()
    (root / "mine/gone").mkdir()
    (root / "mine/gone/file").write_text("root's")
    (root / "lib/instances").rename(root / "lib/was")
    (root / "lib/instances").symlink_to(root / "mine")
    assert vllmctl(root, "forget", "gone", "--yes")[0] in (74, 77)
    assert (root / "mine/gone/file").exists()
