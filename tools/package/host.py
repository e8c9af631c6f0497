"""`python -m tools.package.host LIST [ROOT]`: the files of layout.py on this host, for `make install` (tools/install.sh).

LIST gets the names of all that was made, files first, then directories, the deepest first: what `make uninstall` removes. It is
written before the files are: an installation that was interrupted can be undone. What an earlier one made, and this does not, goes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tools.package import layout
from tools.package.layout import LOCAL


def install(listing: Path, root: Path = Path("/")) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        made = _made(Path(scratch))
        before = _read(listing)
        folders = {name for name in before if name.endswith("/")} | {f"{folder}/" for name in made for folder in _missing(root, name)}
        _write(listing, {*before, *made, *folders})
        for name, source in made.items():
            _place(source, layout.below(root, name))
        for name in sorted({name for name in before if not name.endswith("/")} - set(made)):
            layout.below(root, name).unlink(missing_ok=True)
        _write(listing, {*made, *folders})


def _made(scratch: Path) -> dict[str, Path]:
    """Where each file goes, by its name on the host."""
    layout.write(scratch / "root", LOCAL)
    layout.write_documents(scratch, LOCAL, int(time.time()))
    tops = {"root": "", **{part: LOCAL.place(template) for part, template in layout.DOCUMENTS.items()}}
    return {f"{place}/{path.relative_to(scratch / top)}": path for top, place in tops.items() for path in sorted((scratch / top).rglob("*")) if path.is_file()}


def _missing(root: Path, name: str) -> list[str]:
    return [str(parent) for parent in Path(name).parents if not layout.below(root, str(parent)).exists()]


def _place(source: Path, target: Path) -> None:
    """By a rename: systemd may read a unit at any moment. Whatever root's umask is, others may read it."""
    for folder in reversed(target.parents):
        if not folder.exists():
            folder.mkdir()
            folder.chmod(0o755)
    fresh = target.with_name(f".{target.name}.new")
    fresh.write_bytes(source.read_bytes())
    fresh.chmod(0o644)
    fresh.replace(target)


def _read(listing: Path) -> set[str]:
    return set(listing.read_text().splitlines()) if listing.exists() else set()


def _write(listing: Path, names: Iterable[str]) -> None:
    ordered = sorted(names, key=lambda name: (name.endswith("/"), -name.count("/"), name))
    fresh = listing.with_name(f".{listing.name}.new")
    fresh.write_text("".join(f"{name}\n" for name in ordered))
    fresh.replace(listing)


if __name__ == "__main__":
    install(*map(Path, sys.argv[1:]))
