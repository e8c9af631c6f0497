"""Where each file lies on a host: the one list, for the packages (below /usr) and for `make install` (below /usr/local)."""

from __future__ import annotations

import gzip
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.package import complete, man
from tools.package.wheels import CHECKOUT


@dataclass(frozen=True, slots=True)
class Layout:
    bin: str
    lib: str
    share: str
    polkit: str
    zsh: str
    fish: str

    def place(self, template: str) -> str:
        return template.format(**asdict(self))

    def filled(self, text: str) -> str:
        return text.replace("@BINDIR@", self.bin).replace("@DATADIR@", self.place(DATADIR))


PACKAGE = Layout("/usr/bin", "/usr/lib", "/usr/share", "/usr/share/polkit-1/rules.d", "/usr/share/zsh/vendor-completions", "/usr/share/fish/vendor_completions.d")
LOCAL = Layout("/usr/local/bin", "/usr/local/lib", "/usr/local/share", "/etc/polkit-1/rules.d", "/usr/local/share/zsh/site-functions", "/etc/fish/completions")
"""Debian 12's polkit and fish do not look below /usr/local; the administrator's own directories they always read."""

DATADIR = "{share}/vllmd"
FILES = {
    "units/vllmd@.service": "{lib}/systemd/system/vllmd@.service",
    "units/vllmd-gpu.service": "{lib}/systemd/system/vllmd-gpu.service",
    "units/vllmd.target": "{lib}/systemd/system/vllmd.target",
    "units/vllmd.catalog": "{lib}/systemd/catalog/vllmd.catalog",
    "units/sysusers.d/vllmd.conf": "{lib}/sysusers.d/vllmd.conf",
    "units/tmpfiles.d/vllmd.conf": "{lib}/tmpfiles.d/vllmd.conf",
    "units/polkit-1/vllmd.rules": "{polkit}/50-vllmd.rules",
}
TREES = {"share": DATADIR}
DOCUMENTS = {"doc": "{share}/doc/vllmd", "examples": "{share}/doc/vllmd/examples", "man": "{share}/man"}
"""What `write_documents` makes: an rpm lists it as documentation."""


def write(root: Path, layout: Layout) -> None:
    for source, target in FILES.items():
        put(CHECKOUT / source, below(root, layout.place(target)), layout)
    for tree, target in TREES.items():
        for path in sorted(path for path in (CHECKOUT / tree).rglob("*") if path.is_file()):
            put(path, below(root, layout.place(target)) / path.relative_to(CHECKOUT / tree), layout)
    for template, text in complete.scripts():
        script = below(root, layout.place(template))
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text)


def write_documents(into: Path, layout: Layout, epoch: int) -> None:
    put(CHECKOUT / "README.md", into / "doc/README.md", layout)
    for path in sorted(each for each in (CHECKOUT / "docs").rglob("*") if each.is_file()):
        put(path, into / "doc" / path.relative_to(CHECKOUT / "docs"), layout)
    (into / "doc/NEWS.md.gz").write_bytes(gzip.compress((CHECKOUT / "NEWS.md").read_bytes(), 9, mtime=0))
    put(CHECKOUT / "etc/demo.yaml.example", into / "examples/demo.yaml", layout)
    man.write(into / "man", epoch)


def put(source: Path, target: Path, layout: Layout) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(layout.filled(source.read_text()))


def below(root: Path, place: str) -> Path:
    return root / place.lstrip("/")
