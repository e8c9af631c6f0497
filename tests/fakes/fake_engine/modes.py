# ruff: noqa: RUF009 - mode() makes fields
"""FAKE_* environment names, parsed once. engine.py's docstring has the table for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Timed:
    """`WORD@SECONDS`; `after_s` is 0 where no time is given. An empty word: never."""

    word: str = ""
    after_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.word)


def timed(text: str) -> Timed:
    word, _, after = text.partition("@")
    return Timed(word, float(after or 0))


def traits(text: str) -> frozenset[str]:
    return frozenset(text.split(",")) - {""}


def mode(default: str, parse: Callable[[str], Any] = str) -> Any:
    return field(default=default, metadata={"parse": parse})


@dataclass
class Modes:
    """Each field is the mode FAKE_<FIELD>. Fields that end in `_s` are seconds, already divided by `speed`."""

    speed: float = mode("1", float)
    start_s: float = mode("0.2", float)
    progress: str = mode("strong")
    line_s: float = mode("60", float)
    fail_s: float = mode("0.05", float)
    exit: Timed = mode("", timed)
    exit_ready: Timed = mode("", timed)
    error: str = mode("")
    fail_first: str = mode("")
    bind: str = mode("early")
    listen: Timed = mode("end", timed)
    health: Timed = mode("200", timed)
    health_delay_s: float = mode("0", float)
    completions: Timed = mode("ok", timed)
    front: Timed = mode("ok", timed)
    dead_rank: Timed = mode("", timed)
    paused: str = mode("no")
    helper: Timed = mode("", timed)
    token_s: float = mode("0.005", float)
    task: str = mode("auto")
    heartbeat: str = mode("live")
    metrics: str = mode("ok")
    sigterm: str = mode("ok")
    sigterm_starting: str = mode("lost")
    death_s: float = mode("3", float)
    core: Timed = mode("ok", timed)
    hog: str = mode("")
    stray: frozenset[str] = mode("", traits)
    crowd: int = mode("0", int)
    bomb: Timed = mode("", timed)
    output: str = mode("normal")
    output_mb: float = mode("0", float)
    shm_mb: int = mode("0", int)
    dump: str = mode("")

    @property
    def stop_s(self) -> float:
        """An idle vLLM takes 0.4 to 1.0 s to end."""
        return 0.4 / self.speed


def from_environ(environ: Mapping[str, str]) -> Modes:
    """Raises ValueError for an unknown name or a bad value: a typing error must not make a test pass."""
    known = {f"FAKE_{item.name.upper()}": item for item in fields(Modes)}
    if unknown := [name for name in environ if name.startswith("FAKE_") and name not in known]:
        raise ValueError(f"unknown mode {unknown[0]}")
    values = {item.name: item.metadata["parse"](environ.get(name, str(item.default))) for name, item in known.items()}
    for name in values:
        if name.endswith("_s"):
            values[name] /= values["speed"]
    return Modes(**values)
