"""What is kept beside an installed engine, vllmd-engine.json, so that nothing of it has to be run to know it.

Written by install.py in the directory that is being built; read at every start, as hostile input.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllmd.core.plan import Installed
from vllmd.system.files import read_small

RECORD = "vllmd-engine.json"
CURRENT = "current"
"""The link in the engines directory to the engine that was chosen."""
PREVIOUS = "previous"
"""The link to the engine that was chosen before it."""

_LIMIT_BYTES = 1_000_000
_TEXTS = ("version", "variant", "torch", "cuda", "engine", "rocm", "python", "lock", "installed_at")


@dataclass(frozen=True, slots=True)
class Record:
    """`switches` are those flags that take no value; `torch` its version, `cuda` '' on CPU builds, `rocm` '' on all but
    AMD's; `python` the version it was made with; `py_spy` whether it can show stacks; `lock` the sha256 of the lock file."""

    version: str
    variant: str
    flags: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    torch: str = ""
    cuda: str = ""
    archs: tuple[str, ...] = ()
    engine: str = "vllm"
    rocm: str = ""
    python: str = ""
    py_spy: bool = False
    lock: str = ""
    installed_at: str = ""
    schema: int = 1


def write(directory: Path, record: Record) -> None:
    (directory / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def read(directory: Path) -> Record | None:
    """The record in an engine's directory; None where there is none that can be understood."""
    try:
        raw = json.loads(read_small(directory / RECORD, _LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or raw.get("schema") != 1:
        return None
    text = {name: str(raw.get(name, "")) for name in _TEXTS}
    words = {name: _words(raw.get(name)) for name in ("flags", "switches", "archs")}
    values: dict[str, Any] = {**text, **words, "py_spy": raw.get("py_spy") is True}
    return Record(**values)


def _words(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def describe(executable: Path, chosen: str = "") -> Installed:
    """What is known of the engine whose program this is. The program is given by its real path, because `current` may
    move to another engine while this one runs, and Python imports lazily. `chosen` says by what it was chosen."""
    program = executable.resolve()
    directory = program.parent.parent
    python = program.parent / "python3"
    record = read(directory)
    if record is None:
        version = _version_by_metadata(directory)
        return Installed(str(program), version=version, python=str(python) if python.exists() else "", chosen=chosen)
    return Installed(
        str(program),
        version=record.version,
        variant=record.variant,
        python=str(python),
        flags=frozenset(record.flags),
        cuda=record.cuda,
        archs=record.archs,
        name=directory.name,
        rocm=record.rocm,
        chosen=chosen,
    )


def _version_by_metadata(directory: Path) -> str:
    """An environment that was not made here: `vllm --version` would take 12 s, the folder's name says it at once."""
    for folder in directory.glob("lib/python3*/site-packages/vllm-*.dist-info"):
        return folder.name.removeprefix("vllm-").removesuffix(".dist-info")
    return ""
