"""Wheels for several Pythons in one directory: pure ones once, compiled ones side by side, what is never used left out."""

from __future__ import annotations

import fnmatch
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PRUNED: Mapping[str, str] = {
    "*.dist-info/RECORD": "what pip would remove; this is the package manager's",
    "*.dist-info/sboms/*": "of the builds of compiled modules",
    "*.data/*": "commands and headers: only modules are used",
    "*.pyi": "for type checkers",
    "*.pyx": "what compiled modules were made from",
    "tqdm/completion.sh": "of a command that is not here",
    "*/examples-1.json": "botocore's, for its documentation",
}
SERVICES = ("s3", "sts", "sso", "sso-oidc", "signin")
"""Of botocore's descriptions of services: what an S3 client and the ways to its credentials load. The others are 50 MB."""
_SERVICE = re.compile(r"botocore/data/([^/]+)/.+")
_EXTENSION = re.compile(r"(?P<stem>.+)\.cpython-(?P<python>3\d+)-[\w-]+\.so")


class VendorError(Exception):
    """The wheels do not fit together: says which file, and what to do."""


def is_pruned(name: str) -> bool:
    service = _SERVICE.fullmatch(name)
    if service and service[1] not in SERVICES:
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PRUNED)


def unpack(wheels: Iterable[Path], into: Path) -> None:
    """Merges wheels; two that have different contents for one path do not fit together."""
    for wheel in sorted(wheels):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if not entry.is_dir() and not is_pruned(entry.filename):
                    _place(archive, entry, into)


def _place(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, into: Path) -> None:
    target = into / entry.filename
    if not target.resolve().is_relative_to(into.resolve()):
        raise VendorError(f"{archive.filename}: {entry.filename} leads outside")
    content = archive.read(entry)
    if target.exists():
        # Each build of a compiled distribution has its own tag in there; nothing reads it.
        if target.read_bytes() != content and not entry.filename.endswith(".dist-info/WHEEL"):
            raise VendorError(f"{archive.filename}: {entry.filename} differs from that of another Python's build; prune it, or vendor one Python")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    target.chmod(0o644)


def check_extensions(site: Path, pythons: Sequence[str]) -> None:
    """Every compiled module is there for each Python, unless it is of the stable ABI."""
    wanted = {python.replace(".", "") for python in pythons}
    found: dict[str, set[str]] = {}
    for path in site.rglob("*.so"):
        match = _EXTENSION.fullmatch(str(path.relative_to(site)))
        if match:
            found.setdefault(match["stem"], set()).add(match["python"])
    for stem, has in sorted(found.items()):
        if has != wanted:
            raise VendorError(f"{stem}: built for {', '.join(sorted(has))}, wanted {', '.join(sorted(wanted))}; make the lock anew (python -m tools.package.wheels)")
