"""The packages' scripts on hosts that are set up otherwise than a fresh one, with their directories in the place of the real ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.component

SCRIPTS = Path(__file__).parents[2] / "packaging/scripts"
POSTRM, FUNCTIONS = SCRIPTS / "deb/postrm", SCRIPTS / "functions.sh"
PLACES = ("/var/lib/vllmd", "/etc/vllmd", "/var/cache/vllmd", "/run/vllmd", "/etc/systemd/system", "/opt/vllmd", "/etc/credstore")


def purge(root: Path) -> str:
    """What a purge does to the files; it must not fail: dpkg would be left with half a package."""
    text = POSTRM.read_text().partition("\ncase $1 in")[0]
    for place in PLACES:
        text = text.replace(place, f"{root}{place}")
    script = root / "purge.sh"
    script.write_text(f"set -e\nSTATE={root}/var/lib/vllmd\n{text}\npurge_state\n")
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, env={"PATH": f"{root}/bin:/usr/bin:/bin"}, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("var/lib/vllmd/instances/a/keys.json", "var/lib/vllmd/models/m/config.json", "etc/vllmd/a.yaml", "var/cache/vllmd/compiled/x", "run/vllmd/i/a/lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_purge_leaves_models_and_what_foreign_links_lead_to(root: Path) -> None:
    (root / "srv").mkdir()
    (root / "srv/foreign").write_text("not ours")
    (root / "var/lib/vllmd/public").symlink_to(root / "srv")
    (root / "var/lib/vllmd/instances/link").symlink_to(root / "srv")
    (root / "var/lib/vllmd/-rf *").write_text("")
    assert "kept" in purge(root)
    assert [path.name for path in (root / "var/lib/vllmd").iterdir()] == ["models"]
    assert (root / "srv/foreign").exists()
    assert not any((root / name).exists() for name in ("etc/vllmd", "var/cache/vllmd", "run/vllmd"))


def test_purge_takes_the_keys_of_a_state_that_lies_elsewhere(root: Path) -> None:
    (root / "var/lib/vllmd").rename(root / "big")
    (root / "var/lib/vllmd").symlink_to(root / "big")
    purge(root)
    assert [path.name for path in (root / "big").iterdir()] == ["models"]


def test_purge_leaves_a_configuration_that_a_link_leads_to(root: Path) -> None:
    (root / "etc/vllmd").rename(root / "checkout")
    (root / "etc/vllmd").symlink_to(root / "checkout")
    purge(root)
    assert ((root / "checkout/a.yaml").exists(), (root / "etc/vllmd").is_symlink()) == (True, False)


def test_purge_goes_on_where_something_is_a_file_system_of_its_own(root: Path) -> None:
    """rm cannot remove a mount point; here an rm that refuses one name stands for that."""
    (root / "var/lib/vllmd/mounted").mkdir()
    (root / "bin").mkdir()
    (root / "bin/rm").write_text('#!/bin/sh\n/bin/rm "$@"\ncase "$*" in *mounted*) exit 1 ;; esac\n')
    (root / "bin/rm").chmod(0o755)
    assert "not all of" in purge(root)
    assert not (root / "var/cache/vllmd").exists()


def test_an_upgrade_over_one_that_was_cut_short_keeps_what_still_runs(tmp_path: Path) -> None:
    """dpkg was ended after it had unpacked 2 over 1, which runs: 1 is in .kept alone. Then 3 is installed."""
    lib = tmp_path / "lib"
    for program in (".kept/1", "2"):
        (lib / program / "lib").mkdir(parents=True)
    text = FUNCTIONS.read_text().replace("/usr/lib/vllmd", str(lib)).replace("@PROGRAM@", "2")
    steps = "in_use() { [ ${1##*/} = 1 ]; }\nkeep_program\nrm -r $PROGRAM\nmkdir -p $LIB/3/lib\nPROGRAM=$LIB/3\nrestore_kept_programs\nforget_unused_programs\n"
    subprocess.run(["sh", "-c", f"{text}\n{steps}"], check=True, timeout=30)
    assert sorted(path.name for path in lib.iterdir()) == ["1", "3"]
