"""Debian packages that single tests install into a container: rpm, polkit, nginx. Fetched once by debootstrap, and cached."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.system import tree
from tests.system.tree import _cached, _run

EXTRAS = ("libpam-systemd", "polkitd", "rpm")


def extra_packages(names: tuple[str, ...] = EXTRAS) -> Path:
    """A directory with the .deb files of these and of all they need beyond the container's tree."""
    release = tree.suite()
    return _cached(f"debs-{release}", repr((release, names, tree.PACKAGES, "2")), lambda into: _fetch(into, release, names))


def _fetch(into: Path, release: str, names: tuple[str, ...]) -> None:
    scratch = into / "scratch"
    wanted = ",".join((*tree.PACKAGES, *names))
    _run(["debootstrap", "--variant=minbase", "--download-only", f"--include={wanted}", release, str(scratch)])
    have = (tree.debian_tree() / "var/lib/dpkg/status").read_text()
    for deb in (scratch / "var/cache/apt/archives").glob("*.deb"):
        if f"\nPackage: {deb.name.split('_')[0]}\n" not in f"\n{have}":
            shutil.move(deb, into / deb.name)
    shutil.rmtree(scratch)
