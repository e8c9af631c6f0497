"""Sums that come with a model: sha256sums.txt or manifest.sha256, and the existing tools' cache of sums that were already checked."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllmd.models.inventory import invalid, is_plain, read_small
from vllmd.system.files import read_small as read_own

SUMS_FILE = "sha256sums.txt"
SUMS_FILES = (SUMS_FILE, "manifest.sha256")
CACHE_FILE = ".vllm-integrity-cache"
LIMIT_BYTES = 16 << 20
LINE = re.compile(r"([0-9A-Fa-f]{64}) [ *](.+)", re.ASCII)


def parse(text: str, where: Path) -> dict[str, str]:
    """{name: sum} of `<sum>  name` and `<sum> *name` lines; `# ...` is a comment. ModelInvalid with the line's number on anything else."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.fullmatch(line)
        name = match[2].removeprefix("./") if match else ""
        if match is None or not is_plain(name):
            raise invalid(f"{where}:{number}", f"expected '<sha256>  FILE', got {line[:100]!r}", code="model_corrupt")
        found[name] = match[1].lower()
    if not found:
        raise invalid(where, "lists no file", code="model_corrupt")
    return found


def read(directory: Path) -> dict[str, str]:
    """The sums that the model itself brings; empty where it brings none. ModelInvalid, also where two files disagree; OSError."""
    found: dict[str, str] = {}
    for name in SUMS_FILES:
        for file, sha256 in _read(directory / name).items():
            if found.setdefault(file, sha256) != sha256:
                raise invalid(directory / name, f"says another sum of {file} than {SUMS_FILE}", code="model_corrupt")
    return {name: sha256 for name, sha256 in found.items() if name not in SUMS_FILES}


def _read(path: Path) -> dict[str, str]:
    try:
        text = read_small(path, LIMIT_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return {}
    except IsADirectoryError:
        raise invalid(path, "is a directory", code="model_corrupt") from None
    return parse(text, path)


@dataclass(frozen=True, slots=True)
class Checked:
    """A line of the existing tools' cache. `mtime_s` in whole seconds, as they write it."""

    mtime_s: int
    size: int
    sha256: str


def read_cache(directory: Path) -> Mapping[str, Checked]:
    """What the existing tools remember to have checked; empty where there is nothing, or another schema. OSError."""
    try:
        text = read_own(directory / CACHE_FILE, LIMIT_BYTES).decode("utf-8", "replace")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.EFBIG):
            return {}
        raise
    first, _, rest = text.partition("\n")
    if first.strip() != "# schema=2":
        return {}
    matches = (re.fullmatch(r"(.+)\s(\d{1,18})\s(\d{1,18})\s([0-9a-f]{64})", line) for line in rest.splitlines())
    return {match[1].rstrip(): Checked(int(match[2]), int(match[3]), match[4]) for match in matches if match}
