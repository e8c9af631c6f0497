"""The files of the packages, where they will lie, below one directory: what nfpm then packs.

    root/        as on the host                       config/    what a person may change
    documents/   what the rpm lists as documentation    scripts/   maintainer scripts, filled in
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tools.package import layout, legal, vendor, wheels
from tools.package.layout import PACKAGE
from tools.package.wheels import CHECKOUT, PYTHONS

COMMANDS = {
    "vllmd": "vllmd.cli:main",
    "vllmctl": "vllmd.ctl:main",
    "vllm-preflight": "vllmd.cli:preflight_main",
    "vllm-resolve-model": "vllmd.cli:resolve_main",
    "vllm-serve": "vllmd.cli:serve_main",
}
"""As in pyproject.toml; a test compares them."""


def stage(into: Path, arch: str, program: str, epoch: int) -> None:
    """`program` names the directory of this version's modules: a running supervisor keeps its own through an upgrade."""
    root = into / "root"
    _program(root / "usr/lib/vllmd" / program, arch)
    _commands(root / "usr/bin", f"/usr/lib/vllmd/{program}")
    layout.write(root, PACKAGE)
    layout.write_documents(into / "documents", PACKAGE, epoch)
    layout.put(CHECKOUT / "packaging/lintian-overrides", into / "documents/lintian-overrides", PACKAGE)
    legal.write(into / "documents/doc/copyright", root / "usr/lib/vllmd" / program / _SITE, epoch)
    _config(into / "config")
    _scripts(into / "scripts", program)
    settle(into, epoch)


# -- the program

_SITE = "lib/python3/site-packages"


def _program(program: Path, arch: str) -> None:
    """A virtual environment without a Python of its own: the distribution's runs it, and sees nothing else of the host's modules."""
    site = program / _SITE
    site.mkdir(parents=True)
    vendor.unpack(wheels.fetched(arch).glob("*.whl"), site)
    vendor.check_extensions(site, PYTHONS)
    shutil.copytree(CHECKOUT / "vllmd", site / "vllmd", ignore=shutil.ignore_patterns("__pycache__"))
    (program / "bin").mkdir()
    (program / "bin/python3").symlink_to("../../../../bin/python3")
    (program / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    for python in PYTHONS:
        (program / f"lib/python{python}").symlink_to("python3")


def _commands(bindir: Path, program: str) -> None:
    bindir.mkdir(parents=True)
    for name, entry in COMMANDS.items():
        module, _, function = entry.partition(":")
        command = bindir / name
        command.write_text(f"#!{program}/bin/python3 -I\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n")
        command.chmod(0o755)


# -- the rows of nfpm's description

_OWNED = ("/usr/lib/vllmd", "/usr/share/vllmd", "/usr/share/doc/vllmd")
"""Directories that go with the package; others belong to other packages."""
_RPM_PLACES = {PACKAGE.zsh: "/usr/share/zsh/site-functions"}


def rows(staged: Path, kind: str) -> list[dict[str, object]]:
    found = list(_rows(staged / "root", "", ""))
    doc = "doc" if kind == "rpm" else ""  # nfpm leaves files of this type out of a .deb
    for part, target in layout.DOCUMENTS.items():
        found += _rows(staged / "documents" / part, PACKAGE.place(target), doc)
    for row in found if kind == "rpm" else ():
        for place, here in _RPM_PLACES.items():
            row["dst"] = str(row["dst"]).replace(place, here)
    directories = {str(parent) for row in found for parent in PurePosixPath(str(row["dst"])).parents if str(parent).startswith(_OWNED)}
    made: list[dict[str, object]] = [{"dst": path, "type": "dir", "file_info": {"mode": 0o755}} for path in sorted(directories)]
    return made + found


def _rows(top: Path, target: str, kind: str) -> Iterator[dict[str, object]]:
    for path in sorted(path for path in _below(top) if path.is_symlink() or path.is_file()):
        place = f"{target}/{path.relative_to(top)}"
        if path.is_symlink():
            yield {"src": str(path.readlink()), "dst": place, "type": "symlink"}
        else:
            yield {"src": str(path), "dst": place, **({"type": kind} if kind else {})}


def _config(config: Path) -> None:
    layout.put(CHECKOUT / "etc/vllmd.yaml", config / "etc/vllmd/vllmd.yaml", PACKAGE)
    layout.put(CHECKOUT / "packaging/default", config / "etc/default/vllmd", PACKAGE)


def _scripts(scripts: Path, program: str) -> None:
    functions = (CHECKOUT / "packaging/scripts/functions.sh").read_text().replace("@PROGRAM@", program)
    for path in sorted((CHECKOUT / "packaging/scripts").glob("*/*")):
        target = scripts / path.relative_to(CHECKOUT / "packaging/scripts")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{functions}\n{path.read_text()}")
        target.chmod(0o755)


def settle(top: Path, epoch: int) -> None:
    """Modes and times depend on neither the umask nor the hour of the build."""
    for path in _below(top):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def _below(top: Path) -> Iterator[Path]:
    for path in top.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)
        yield path
