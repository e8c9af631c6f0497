"""The program's Python dependencies, as wheels: locked with hashes in packaging/vendored.txt, fetched once, kept in the cache.

`python -m tools.package.wheels` writes the lock anew, from pyproject.toml and what pip finds today.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
LOCK = CHECKOUT / "packaging/vendored.txt"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
"""Debian 12 has 3.11, Debian 13 has 3.13; the others are for distributions that install the rpm."""
MACHINES: Mapping[str, str] = {"amd64": "x86_64", "arm64": "aarch64"}
_PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
_UNUSED = ("boto3", "s3transfer")
"""Locked out: the store speaks to S3 through botocore alone. Requirements of pyproject.toml that name them ask for botocore."""


def cache_directory() -> Path:
    chosen = os.environ.get("VLLMD_DEV_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllmd-dev"


def fetched(arch: str) -> Path:
    """A directory with every locked wheel of an architecture, for every Python; appears by one rename."""
    key = hashlib.sha256(repr((LOCK.read_text(), PYTHONS, _PLATFORMS)).encode()).hexdigest()[:12]
    target = cache_directory() / f"vendored-{arch}-{key}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".vendored-", dir=target.parent) as scratch:
            building = Path(scratch, "wheels")
            _download(building, arch, ["--require-hashes", "--no-deps", "-r", str(LOCK)])
            building.chmod(0o755)
            _publish(building, target)
    return target


def _publish(building: Path, target: Path) -> None:
    try:
        building.rename(target)
    except OSError:
        if not target.exists():  # else another build was first
            raise


def _download(into: Path, arch: str, wanted: list[str]) -> None:
    platforms = [f"--platform={kind}_{MACHINES[arch]}" for kind in _PLATFORMS]
    for python in PYTHONS:
        choice = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(into), *choice, *wanted]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, cwd=into.parent)
        if done.returncode != 0:
            raise SystemExit(f"pip could not fetch the wheels for {arch}, Python {python}:\n{done.stderr[-3000:]}")


# -- the lock


def lock_text(wheels: Mapping[tuple[str, str], set[str]]) -> str:
    head = "# The Python dependencies in the packages. Made by `python -m tools.package.wheels`; all architectures, all Pythons.\n"
    rows = ("".join([f"{name}=={version}", *(f" \\\n    --hash=sha256:{digest}" for digest in sorted(digests)), "\n"]) for (name, version), digests in sorted(wheels.items()))
    return head + "".join(rows)


def requirements() -> list[str]:
    """What pyproject.toml asks for, without what is not used at run time."""
    declared = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    return ["botocore" if re.match(r"[\w-]+", each)[0] in _UNUSED else each for each in declared]  # type: ignore[index]


def _identities(directory: Path) -> Iterator[tuple[tuple[str, str], str]]:
    for wheel in sorted(directory.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        yield (name.lower().replace("_", "-"), version), hashlib.sha256(wheel.read_bytes()).hexdigest()


def lock() -> None:
    found: dict[tuple[str, str], set[str]] = {}
    scratch = Path(tempfile.mkdtemp(prefix="vllmd-lock-"))
    try:
        for arch in MACHINES:
            _download(scratch / arch, arch, requirements())
            for identity, digest in _identities(scratch / arch):
                found.setdefault(identity, set()).add(digest)
    finally:
        shutil.rmtree(scratch)
    LOCK.write_text(lock_text(found))


if __name__ == "__main__":
    lock()
