"""The manifest of a published version: what was fetched, from where, and the sums of every file. DIRECTORY/.vllmd-manifest.json.

Its SHA-256 names the version. Unlike the manifest of a user's own directory (models/manifest) it says nothing of times or
inodes, which a copy or a hard link changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllmd.models.inventory import invalid, is_plain
from vllmd.system.files import read_small, write_atomic

if TYPE_CHECKING:
    from vllmd.models.remote import Listing

FILE = ".vllmd-manifest.json"
LIMIT_BYTES = 64 << 20
SCHEMA = 1
_SUM = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file; sums in hex. `pin` is the source's own mark of this version of it ('' where it has none)."""

    size: int
    sha256: str
    blake3: str
    pin: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """`created_at` is UTC, ISO 8601. `origin` where it came from, for people."""

    identity: str
    source: str
    origin: str
    revision: str
    created_at: str
    files: Mapping[str, Entry]

    @property
    def sha256(self) -> str:
        """Names the content: names, sizes and sums of the files, and nothing of where they came from or when."""
        content = [[name, entry.size, entry.sha256] for name, entry in sorted(self.files.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())


def is_listed(contents: Contents, listing: Listing) -> bool:
    """Whether a version is what the source offers now, by its sums or else by its pins; no byte is read."""
    if contents.files.keys() != {file.name for file in listing.files}:
        return False
    return all(_same(contents.files[file.name], file.size, file.sums.get("sha256", ""), file.pin) for file in listing.files)


def _same(entry: Entry, size: int, sha256: str, pin: str) -> bool:
    if entry.size != size:
        return False
    return entry.sha256 == sha256 if sha256 else bool(pin) and entry.pin == pin


def write(directory: Path, contents: Contents) -> None:
    """OSError."""
    write_atomic(directory / FILE, json.dumps({"schema": SCHEMA, **asdict(contents)}, indent=1) + "\n")


def read(directory: Path) -> Contents:
    """FileNotFoundError where there is none; ModelInvalid where it is no manifest of ours; OSError."""
    path = directory / FILE
    try:
        return parse(read_small(path, LIMIT_BYTES))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise invalid(path, f"is no manifest: {error}", code="manifest_damaged") from None


def parse(data: bytes) -> Contents:
    """ValueError, TypeError, KeyError or AttributeError on anything that `write` does not write."""
    document: dict[str, Any] = json.loads(data.decode("utf-8"))
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']!r}")
    texts = {key: document[key] for key in ("identity", "source", "origin", "revision", "created_at")}
    files = {name: Entry(**entry) for name, entry in document["files"].items()}
    if not all(isinstance(text, str) for text in texts.values()) or not all(map(is_plain, files)):
        raise ValueError("wrong fields")
    for entry in files.values():
        if type(entry.size) is not int or entry.size < 0 or not isinstance(entry.pin, str):
            raise ValueError("wrong fields")
        if not _SUM.fullmatch(entry.sha256) or not _SUM.fullmatch(entry.blake3):
            raise ValueError("wrong sums")
    return Contents(**texts, files=files)
