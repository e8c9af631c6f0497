"""What the bytes of an entry of the store must be, by the sums that are there, and which files are not that.

A published version has its manifest; a hub cache names large files by their SHA-256; a user's own directory that was verified
before has a manifest beside the store.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllmd.models import manifest, published
from vllmd.models.catalog import HUB_KIND, LOCAL_KIND, PUBLISHED_KIND, Item
from vllmd.models.contents import FILE
from vllmd.models.hashing import Digest, hash_files
from vllmd.models.inventory import ModelFile
from vllmd.models.places import is_real_directory

_SUM = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Expected:
    """`files` are to be read; `sums` what each must have, of one algorithm. `wrong` is known without reading: name -> reason."""

    directory: Path
    files: tuple[ModelFile, ...]
    sums: Mapping[str, Digest]
    wrong: Mapping[str, str] = field(default_factory=dict)


def expected(item: Item) -> Expected | None:
    """None where no sums speak for it. OSError."""
    if item.kind == PUBLISHED_KIND:
        return _version(item.directory)
    if item.kind == HUB_KIND:
        return _hub(item.directory / "blobs")
    return _own(item) if item.kind == LOCAL_KIND else None


def _version(directory: Path) -> Expected:
    contents = published.manifest_of(directory)
    if contents is None:
        return Expected(directory, (), {}, {FILE: "is missing, or is not the manifest of this version"})
    sums = {name: (entry.size, Digest(blake3=entry.blake3)) for name, entry in contents.files.items()}
    return _compared(directory, sums)


def _hub(blobs: Path) -> Expected | None:
    names = [path.name for path in sorted(blobs.iterdir()) if _SUM.fullmatch(path.name)] if is_real_directory(blobs) else []
    # An unfinished download has another name: under this one the whole file lies.
    return _compared(blobs, {name: (None, Digest(sha256=name)) for name in names}) if names else None


def _own(item: Item) -> Expected | None:
    """By the manifest that a start with `verify: sha256` left."""
    real = Path(os.path.realpath(item.directory))
    above = item.directory.parent / manifest.DIRECTORY
    for path in sorted(above.glob("*.json")) if is_real_directory(above) else []:
        known = manifest.load(path, real, lambda _text: None)
        sums = {name: (record.size, Digest(blake3=record.blake3)) for name, record in known.files.items() if record.blake3} if known else {}
        if sums:
            return _compared(real, sums)
    return None


def _compared(directory: Path, sums: Mapping[str, tuple[int | None, Digest]]) -> Expected:
    files, wrong = [], {}
    for name, (size, _) in sums.items():
        file = _file(directory, name)
        if file is None:
            wrong[name] = "is missing, or is no plain file"
        elif size is not None and file.size != size:
            wrong[name] = f"has {file.size} bytes and not {size}"
        else:
            files.append(file)
    return Expected(directory, tuple(files), {file.name: sums[file.name][1] for file in files}, wrong)


def _file(directory: Path, name: str) -> ModelFile | None:
    try:
        status = os.lstat(directory / name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    is_file = stat.S_ISREG(status.st_mode)
    return ModelFile(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino) if is_file else None


def differences(expected: Expected, report: Callable[[int, int], None]) -> dict[str, str]:
    """Name -> what is wrong with it. Reads every byte; `report(done, total)` twice a second. ModelInvalid where a file vanishes
    meanwhile, PermissionMissing, StorageFailed."""
    wrong = dict(expected.wrong)
    wanted = {file: frozenset({"sha256" if expected.sums[file.name].sha256 else "blake3"}) for file in expected.files}
    digests = hash_files(expected.directory, wanted, report)
    for name, digest in digests.items():
        must = expected.sums[name]
        if digest != must:
            kind, have, want = ("SHA-256", digest.sha256, must.sha256) if must.sha256 else ("BLAKE3", digest.blake3, must.blake3)
            wrong[name] = f"has the {kind} {have[:16]}... and not {want[:16]}...: its bytes changed"
    return wrong
