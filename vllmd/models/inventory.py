"""Which files a model directory holds: the first step of validation, and the list that a manifest is made of.

A model directory is hostile input. A link may lead only to where its boundary allows: a hub cache's snapshot links to
../../blobs, and newer hub clients let those link on to blobs/ of the whole cache; any other model's boundary is its own
directory. Otherwise a "model" could make the engine read, and serve, any file of the host.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from vllmd.errors import ModelInvalid

MAX_FILES = 100_000
MAX_DEPTH = 16
OWN_FILES = (".complete", ".vllm-model-provenance", ".vllm-integrity-cache", ".vllmd-manifest.json")
"""Written by tools, not part of the model."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """`name` is relative to the model's directory, with '/'. Times in ns; links are followed."""

    name: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Inventory:
    directory: Path
    files: Mapping[str, ModelFile]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def top(self) -> list[ModelFile]:
        """The files at the root, where engines look."""
        return [file for name, file in self.files.items() if "/" not in name]


def invalid(path: Path | str, reason: str, hint: str = "", code: str = "model_invalid") -> ModelInvalid:
    # Names of a hostile model's files go to terminals and journals: no control characters, and one line.
    what = "".join(char if char.isprintable() else repr(char)[1:-1] for char in f"{path}: {reason}")
    return ModelInvalid(code, what, hint or "Put the model there again, or let another source provide it.")


def boundary(directory: Path) -> tuple[Path, ...]:
    """Where links of a model in `directory` (a real path) may lead."""
    if not is_snapshot(directory):
        return (directory,)
    repository = directory.parent.parent
    return (repository, repository.parent / "blobs")


def is_snapshot(directory: Path) -> bool:
    """Whether it is HUB/models--ORG--NAME/snapshots/REVISION."""
    return directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")


def is_plain(name: str) -> bool:
    """Whether a name that stands in a model's own files stays in its directory: relative, no '..', nothing odd."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and name.isprintable()


def take(directory: Path) -> Inventory:
    """All files below `directory`, a real path. ModelInvalid where a link leaves its boundary, or leads nowhere."""
    files: dict[str, ModelFile] = {}
    _walk(directory, "", boundary(directory), files, MAX_FILES)
    return Inventory(directory, files)


def _walk(directory: Path, prefix: str, within: tuple[Path, ...], files: dict[str, ModelFile], left: int) -> int:
    """Of `left`, which counts directories too, what is left afterwards."""
    if prefix.count("/") > MAX_DEPTH:
        raise invalid(directory, "lies too deep for a model", code="model_unsafe")
    with os.scandir(directory) as entries:
        listed = list(islice(entries, left + 1))
    left -= len(listed)
    if left < 0:
        raise invalid(directory, f"more than {MAX_FILES} files are too many for a model", code="model_unsafe")
    for entry in sorted(listed, key=lambda entry: entry.name):
        left = _add(entry, prefix, within, files, left)
    return left


def _add(entry: os.DirEntry[str], prefix: str, within: tuple[Path, ...], files: dict[str, ModelFile], left: int) -> int:
    if entry.is_symlink():
        _check_link(Path(entry.path), within)
    if entry.is_dir():
        # A download tool's notes (.cache/huggingface, .git) are not the model; what a link inside leads to is seen there.
        if not entry.name.startswith(".") and not entry.is_symlink():
            return _walk(Path(entry.path), f"{prefix}{entry.name}/", within, files, left)
        return left
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):
        raise invalid(entry.path, "is neither a file nor a directory", code="model_unsafe")
    name = prefix + entry.name
    if name not in OWN_FILES:
        files[name] = ModelFile(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return left


def _check_link(link: Path, within: tuple[Path, ...]) -> None:
    try:
        target = Path(os.path.realpath(link, strict=True))
    except FileNotFoundError:
        target_text = link.readlink()
        raise invalid(link, f"is a link to {target_text}, which does not exist (a download that did not finish?)") from None
    if not any(target.is_relative_to(allowed) for allowed in within):
        hint = f"Replace the link by the file itself, so that the model is complete in {within[0]}."
        raise invalid(link, f"is a link that leaves the model's directory, to {target}", hint, "model_unsafe")


def open_file(directory: Path, name: str) -> int:
    """An fd to read `name`; never waits, not even for a FIFO put there since the inventory was taken."""
    return os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def read_ends(path: Path, each_bytes: int) -> tuple[bytes, bytes]:
    """The first and the last bytes of the file."""
    with open(open_file(path.parent, path.name), "rb") as file:
        first = file.read(each_bytes)
        file.seek(max(0, os.fstat(file.fileno()).st_size - each_bytes))
        return first, file.read(each_bytes)


def read_small(path: Path, limit_bytes: int) -> bytes:
    """The whole file; ModelInvalid where it is larger than `limit_bytes`."""
    with open(open_file(path.parent, path.name), "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise invalid(path, f"is larger than {limit_bytes} bytes, which no such file is")
    return data
