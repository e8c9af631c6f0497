"""The packages of an engine: what pip recorded of their files (RECORD), kept true where we change a file, and sealed.

RECORD holds path, sha256 and size of each file of a distribution. The seal, vllmd-packages.json, holds the sha256 of each
RECORD: a pip that was let loose on an engine later writes new ones, and does not go unnoticed.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllmd.system.files import read_small

SEAL = "vllmd-packages.json"
_LIMIT_BYTES = 64 << 20
_RELATIVE = b'#!/bin/sh\n\'\'\'exec\' "$(dirname -- "$(readlink -f -- "$0")")"/python3 "$0" "$@"\n\' \'\'\'\n'
"""Lets a shell find the Python beside the script: to sh the second line is a command, to Python a string."""


@dataclass(frozen=True, slots=True)
class Row:
    """A file of a distribution; `sha256` '' and `size` None where pip recorded none (bytecode, RECORD itself)."""

    path: str
    sha256: str
    size: int | None


def site(directory: Path) -> Path:
    """The engine's site-packages. FileNotFoundError where it has none."""
    found = sorted(directory.glob("lib/python3*/site-packages"))
    if not found:
        raise FileNotFoundError(2, "it has no site-packages", str(directory))
    return found[0]


def records(directory: Path) -> dict[str, Path]:
    """RECORD by the name of its distribution's folder."""
    return {path.parent.name: path for path in sorted(site(directory).glob("*.dist-info/RECORD"))}


def rows(path: Path) -> Iterator[Row]:
    """OSError; lines that make no sense are passed over. Some wheels bring bytecode, which pip replaces by its own without
    correcting its sum."""
    text = read_small(path, _LIMIT_BYTES).decode("utf-8", "replace")
    for each in csv.reader(io.StringIO(text, newline="")):
        if len(each) >= 3 and each[0]:
            kind, _, digest = each[1].partition("=")
            is_kept = kind == "sha256" and not each[0].endswith(".pyc")
            yield Row(each[0], digest if is_kept else "", int(each[2]) if each[2].isascii() and each[2].isdigit() else None)


def encoded(digest: bytes) -> str:
    """As in RECORD: base64 for addresses, without its padding."""
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def seal(directory: Path) -> None:
    """Writes down which RECORDs there are. OSError."""
    known = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in records(directory).items()}
    (directory / SEAL).write_text(json.dumps({"schema": 1, "records": known}, indent=1) + "\n", encoding="utf-8")


def sealed(directory: Path) -> dict[str, str] | None:
    """sha256 by distribution; None where there is no seal that can be understood."""
    try:
        value = json.loads(read_small(directory / SEAL, _LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    found = value.get("records") if isinstance(value, dict) else None
    return {str(name): str(digest) for name, digest in found.items()} if isinstance(found, dict) else None


def add_distribution(site_packages: Path, name: str, version: str) -> None:
    """A distribution of nothing but its name."""
    folder = site_packages / f"{name}-{version}.dist-info"
    folder.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    (folder / "METADATA").write_bytes(metadata)
    row = f"{folder.name}/METADATA,sha256={encoded(hashlib.sha256(metadata).digest())},{len(metadata)}\n"
    (folder / "RECORD").write_text(f"{row}{folder.name}/RECORD,,\n", encoding="utf-8")


def make_scripts_relative(directory: Path) -> None:
    """The first lines of scripts hold the path that the environment was made at; RECORD follows the change."""
    absolute = f"#!{directory}/bin/python".encode()
    changed: dict[str, bytes] = {}
    for script in (directory / "bin").iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        content = script.read_bytes()
        if content.startswith(absolute):
            changed[script.name] = _RELATIVE + content.split(b"\n", 1)[1]
            script.write_bytes(changed[script.name])
    for path in records(directory).values():
        _correct(path, changed)


def _correct(record: Path, changed: dict[str, bytes]) -> None:
    """Scripts stand there as ../../../bin/NAME."""
    text = record.read_text(encoding="utf-8")
    table = list(csv.reader(io.StringIO(text, newline="")))
    is_ours = False
    for row in table:
        folder, _, name = row[0].rpartition("/") if row else ("", "", "")
        if folder == "../../../bin" and name in changed and len(row) >= 3:
            row[1:3] = [f"sha256={encoded(hashlib.sha256(changed[name]).digest())}", str(len(changed[name]))]
            is_ours = True
    if is_ours:
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator="\n").writerows(table)
        record.write_text(out.getvalue(), encoding="utf-8")
