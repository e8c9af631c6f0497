"""What a model's bytes were when they were first seen whole: STORE/.manifests/<slug>.<hash12>.json.

Kept beside the store, never in a user's own directory. A file of ours that is damaged is put aside with a warning and made
anew: state of our own never stops a start.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllmd.errors import VllmdError
from vllmd.models.inventory import ModelFile
from vllmd.models.ioerrors import translated
from vllmd.models.lock import private_directory
from vllmd.system.files import read_small, write_atomic

DIRECTORY = ".manifests"
LIMIT_BYTES = 64 << 20
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One file. Times in ns; `sha256` and `blake3` in hex, '' where not computed."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: str = ""
    blake3: str = ""

    def is_of(self, file: ModelFile) -> bool:
        """Whether the file is untouched since. The change time is compared too, as nobody can set it back."""
        return (self.size, self.mtime_ns, self.ctime_ns, self.inode) == (file.size, file.mtime_ns, file.ctime_ns, file.inode)


@dataclass(frozen=True, slots=True)
class Manifest:
    identity: str
    directory: str
    source: str
    revision: str
    files: Mapping[str, Record]

    @property
    def sha256(self) -> str:
        """Names the content: names, sizes and sums of the files, and nothing that a copy would change."""
        content = [[name, record.size, record.sha256] for name, record in sorted(self.files.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def path_of(store: Path, label: str, kind: str = "") -> Path:
    return store / DIRECTORY / f"{label}{kind}.json"


def load(path: Path, directory: Path, warn: Callable[[str], None]) -> Manifest | None:
    """The manifest of the model in `directory`; None where there is none, or it is another directory's, or damaged."""
    try:
        found = _parse(json.loads(read_small(path, LIMIT_BYTES)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EINVAL, errno.EFBIG):
            raise
        warn(f"{path} is not a manifest of ours ({error.strerror}); it is made anew")
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        warn(f"{path} is damaged; it is made anew")
        return None
    return found if found.directory == str(directory) else None


def _parse(document: dict[str, Any]) -> Manifest:
    files = {name: Record(**record) for name, record in document["files"].items()}
    texts = {key: document[key] for key in ("identity", "directory", "source", "revision")}
    if document["schema"] != SCHEMA or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("wrong fields")
    for record in files.values():
        if not all(type(value) is (int if key not in ("sha256", "blake3") else str) for key, value in asdict(record).items()):
            raise ValueError("wrong fields")
    return Manifest(**texts, files=files)


def save(path: Path, manifest: Manifest, warn: Callable[[str], None]) -> None:
    """Replace the file. Where that cannot be done it is said, and the start goes on without."""
    document = {"schema": SCHEMA, **asdict(manifest)}
    try:
        private_directory(path.parent.parent, DIRECTORY)
        write_atomic(path, json.dumps(document, indent=1) + "\n")
    except (OSError, VllmdError) as error:
        reason = translated(error, f"write {path}").what if isinstance(error, OSError) else error.what
        warn(f"what was verified cannot be remembered: {reason}")
