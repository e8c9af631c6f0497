"""Looks for planted secrets wherever a host keeps, shows or hands on something.

    planted = plant("api-key", "hf-token")            # NAME -> VALUE, values that nothing else can contain
    found = search(planted, [*files([Path("/etc")]), *processes(pids), ("journal", journal_bytes)], ALLOWED)
    assert found == []

A place is a name and its bytes. A value counts in every spelling in which it may turn up: as it is, in JSON, in a URL, in base64
at each of its three offsets, and in hexadecimal. Places where a secret must stand are a written list, each with its reason;
even there it counts where every user of the host may read the file.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

LIMIT_BYTES = 64 << 20
WORLD = "world-readable "
"""Before the name of a file that everybody may read: no pattern of an allowed place begins with it."""
Place = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Allowed:
    """A place where a secret must stand: a shell pattern over names of places, and why."""

    pattern: str
    reason: str


def plant(*names: str) -> dict[str, str]:
    """Values that cannot stand anywhere by chance, with a character that JSON keeps and URLs change."""
    return {name: f"planted/{name}+{os.urandom(12).hex()}" for name in names}


def spellings(value: str) -> set[bytes]:
    raw = value.encode()
    found = {raw, json.dumps(value)[1:-1].encode(), quote(value).encode(), quote(value, safe="").encode(), raw.hex().encode()}
    for offset in range(3):
        text = base64.b64encode(b"\0" * offset + raw)
        whole = text[4 if offset else 0 : -4]  # without the groups that the neighbours share
        found |= {whole, whole.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def search(planted: Mapping[str, str], places: Iterable[Place], allowed: Sequence[Allowed] = ()) -> list[str]:
    """'SECRET in PLACE' for each that is where it may not be."""
    wanted = {name: spellings(value) for name, value in planted.items()}
    found = []
    for where, content in places:
        if any(fnmatchcase(where, each.pattern) for each in allowed):
            continue
        found += [f"{name} in {where}" for name, forms in wanted.items() if any(form in content for form in forms)]
    return found


def processes(pids: Iterable[int], proc: Path = Path("/proc")) -> Iterator[Place]:
    """Command line, environment and name of each, and of each thread: 'process COMM cmdline'."""
    for pid in pids:
        folder = proc / str(pid)
        with contextlib.suppress(OSError):
            name = (folder / "comm").read_text().strip()
            for file in ("cmdline", "environ", "comm"):
                with contextlib.suppress(OSError):
                    yield f"process {name} {file}", (folder / file).read_bytes()
            for task in (folder / "task").iterdir():
                with contextlib.suppress(OSError):
                    yield f"process {name} thread", (task / "comm").read_bytes()


def files(tops: Iterable[Path], *, root: str = "") -> Iterator[Place]:
    """Every regular file below, and the names of all; `root` is taken off the names. Nothing is followed."""
    for top in tops:
        for folder, directories, names in os.walk(top):
            yield f"names in {folder.removeprefix(root)}", "\0".join([*directories, *names]).encode(errors="surrogateescape")
            for name in (*directories, *names):
                with contextlib.suppress(OSError):
                    yield from _file(Path(folder, name), root)


def _file(path: Path, root: str) -> Iterator[Place]:
    about, name = path.lstat(), str(path).removeprefix(root)
    if stat.S_ISLNK(about.st_mode):
        yield f"link {name}", os.fsencode(path.readlink())
    elif stat.S_ISREG(about.st_mode):
        yield (WORLD if about.st_mode & stat.S_IROTH and _open_to_all(path.parent, root) else "") + name, _content(path)


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LIMIT_BYTES)


def _open_to_all(folder: Path, root: str) -> bool:
    """Whether anybody may pass through all directories above."""
    while str(folder) not in (root, "/", "."):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return False
        folder = folder.parent
    return True
