"""What a container is made of, built once and cached outside of the checkout: a Debian tree, and the wheels for its Python.

Mirrors and indexes are those that debootstrap and pip are set up with. Each thing is keyed by a hash of its recipe, and
appears by one rename: an interrupted build is never used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
SUITES = {"bookworm": "3.11", "trixie": "3.13"}
"""The Debian releases that the tests know, and the Python of each."""
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "libgomp1", "libnuma1")
"""No procps: a minimal Debian has none, and nothing of ours may need it. The two libraries are torch's."""
MASKED = ("console-getty.service", "container-getty@.service", "serial-getty@.service", "getty@.service", "apt-daily.timer", "apt-daily-upgrade.timer")
BUILD_TIMEOUT_S = 900.0


def cache_directory() -> Path:
    """VLLMD_DEV_CACHE, else vllmd-dev in the user's cache directory."""
    chosen = os.environ.get("VLLMD_DEV_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllmd-dev"


def suite() -> str:
    """The Debian release of the containers: VLLMD_TEST_SUITE, else the older one."""
    chosen = os.environ.get("VLLMD_TEST_SUITE") or "bookworm"
    if chosen not in SUITES:
        raise RuntimeError(f"VLLMD_TEST_SUITE: {chosen!r} is none of {', '.join(SUITES)}")
    return chosen


def debian_tree(release: str = "") -> Path:
    """The root file system of the containers, of that release or of `suite`: nothing but Debian, never changed."""
    release = release or suite()
    recipe = repr((release, PACKAGES, MASKED, "3"))
    return _cached(f"tree-{release}", recipe, lambda into: _debootstrap(into, release))


def wheelhouse() -> Path:
    """All wheels that an installation without network needs, for the containers' Python."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"], "wheel"]
    python = SUITES[suite()]
    return _cached("wheels", repr((python, sorted(wanted))), lambda into: _download(into, wanted, python))


def _cached(name: str, recipe: str, build: Callable[[Path], None]) -> Path:
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with _lock(cache / f".{name}.lock"):
        if not target.exists():
            building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
            try:
                building.chmod(0o755)
                build(building)
                building.rename(target)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _debootstrap(into: Path, release: str) -> None:
    # In a mount namespace of its own: a killed debootstrap leaves /proc mounted in the tree that is then to be removed.
    _run(["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", release, str(into)])
    for masked in MASKED:
        (into / "etc/systemd/system" / masked).symlink_to("/dev/null")
    for waste in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(into / waste)
        (into / waste).mkdir()


def _download(into: Path, wanted: list[str], python: str) -> None:
    choice = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(into), *choice, *wanted])


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
