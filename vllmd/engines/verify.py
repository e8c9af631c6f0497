"""`vllmctl engine verify`: every file of an engine against what pip recorded of it, on all cores.

A disk that lost a bit, a package that was changed by hand, a pip that was run inside: each shows in a start that fails after
half a minute with words about something else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from vllmd.engines import packages
from vllmd.engines.packages import Row

_READ_BYTES = 1 << 20


@dataclass(slots=True)
class Report:
    """Paths are relative to the engine. `unrecorded`: files in site-packages that no package has; `packages` those that
    came, went or changed as a whole since the installation."""

    engine: str
    checked: int = 0
    bytes: int = 0
    without_hash: int = 0
    is_sealed: bool = True
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not (self.changed or self.missing or self.unrecorded or self.packages)


def verify(directory: Path, workers: int = 0) -> Report:
    """Reads every file of the engine. OSError where its packages cannot be read at all."""
    report = Report(directory.name)
    site = packages.site(directory)
    recorded = packages.records(directory)
    _compare_seal(directory, recorded, report)
    rows = list(chain.from_iterable(packages.rows(path) for path in recorded.values()))
    known = {os.path.normpath(site / row.path) for row in rows}
    report.unrecorded += sorted(_relative(directory, path) for path in _strangers(site, known))
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:  # hashlib works without the interpreter's lock
        for row, size, complaint in pool.map(lambda row: (row, *_look(site, row)), rows):
            report.checked += 1
            report.bytes += size
            report.without_hash += not row.sha256
            if complaint:
                getattr(report, complaint).append(_relative(directory, os.path.normpath(site / row.path)))
    return report


def _relative(directory: Path, path: str) -> str:
    return os.path.relpath(path, directory)


def _compare_seal(directory: Path, recorded: dict[str, Path], report: Report) -> None:
    sealed = packages.sealed(directory)
    if sealed is None:
        report.is_sealed = False
        return
    now = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in recorded.items()}
    for name in sorted({*sealed, *now}):
        if name not in now:
            report.packages.append(f"{name} is gone")
        elif name not in sealed:
            report.packages.append(f"{name} was added")
        elif now[name] != sealed[name]:
            report.packages.append(f"{name}: its list of files was changed")


def _look(site: Path, row: Row) -> tuple[int, str]:
    """(bytes read, '', changed or missing). Bytecode that is gone is made again."""
    path = site / row.path
    try:
        if not row.sha256:
            return (0, "" if path.exists() or row.path.endswith(".pyc") else "missing")
        digest, size = hashlib.sha256(), 0
        with path.open("rb", buffering=0) as stream:
            while piece := stream.read(_READ_BYTES):
                digest.update(piece)
                size += len(piece)
    except (FileNotFoundError, NotADirectoryError):
        return (0, "missing")
    except OSError:  # a disk that gives an error instead of the bytes
        return (0, "changed")
    return (size, "" if packages.encoded(digest.digest()) == row.sha256 else "changed")


def _strangers(site: Path, known: Iterable[str]) -> list[str]:
    """Files that no package recorded, bytecode apart: Python imports them all the same."""
    found = []
    for folder, folders, names in os.walk(site):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [path for name in names if (path := os.path.join(folder, name)) not in known]  # noqa: PTH118 - 60,000 of them
    return found
