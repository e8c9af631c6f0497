"""Which crash is this? The tracebacks among an engine's lines, and a fingerprint that the same crash has again.

A fingerprint is made of what stays the same between two lives: the type of the exception, and function and file of each
frame. Line numbers, addresses, pids, paths above site-packages and the message's figures are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

FRAMES = 64
"""More than these, from the innermost on, tell nothing new (a recursion has a thousand)."""

_PREFIX = re.compile(r"^(\([^)]{1,80}\) )?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]{1,120}\] ?)?)?")
"""The engine's own: '(Worker pid=7) ERROR 11-21 09:38:09 [multiproc_executor.py:953] '. Lines of several processes are mixed."""
_BEGIN = "Traceback (most recent call last):"
_FRAME = re.compile(r'^\s*File "([^"]{1,1000})", line \d+(?:, in (.{1,200}))?$')
_EXCEPTION = re.compile(r"^([A-Za-z_][\w.]{0,200})(?::\s?(.*))?$")
_PACKAGES = re.compile(r"^.*/(?:site|dist)-packages/|^.*/lib/python[\d.]+/")


@dataclass(frozen=True, slots=True)
class Traceback:
    """`at` is the index of the line that names the exception; `frames` are (file, function), the innermost last."""

    exception: str
    message: str
    frames: tuple[tuple[str, str], ...]
    at: int

    @property
    def text(self) -> str:
        return f"{self.exception}: {self.message}" if self.message else self.exception


@dataclass(slots=True)
class _Open:
    """A traceback that is being read."""

    frames: list[tuple[str, str]]


def plain(line: str) -> tuple[str, str]:
    """(who wrote it, the line without the log's prefix)."""
    found = _PREFIX.match(line)
    return ((found[1] or "") if found else "", line[found.end() :] if found else line)


def is_logged(line: str) -> bool:
    """Through the engine's log, with a level, and not just printed."""
    found = _PREFIX.match(line)
    return found is not None and len(found[0]) > len(found[1] or "")


def tracebacks(lines: Sequence[str]) -> list[Traceback]:
    """The whole ones, in the order in which they ended."""
    found: list[Traceback] = []
    reading: dict[str, _Open] = {}
    for index, line in enumerate(lines):
        who, text = plain(line)
        if text.strip() == _BEGIN:
            reading[who] = _Open([])
            continue
        current = reading.get(who)
        if current is None:
            continue
        frame = _FRAME.match(text)
        if frame:
            current.frames.append((frame[1], frame[2] or ""))
        elif text and not text[0].isspace():
            del reading[who]
            named = _EXCEPTION.match(text)
            if named and current.frames:
                found.append(Traceback(named[1].rpartition(".")[2], _message(named[2] or "", lines, index, who), tuple(current.frames), index))
    return found


def _message(first: str, lines: Sequence[str], index: int, who: str) -> str:
    """pydantic says '1 validation error for ModelConfig', and what is wrong on the next line."""
    if "validation error" in first and index + 1 < len(lines):
        other, text = plain(lines[index + 1])
        if other == who and text.startswith(" "):
            return f"{first}: {text.strip()}"
    return first


def root_cause(lines: Sequence[str], echoes: Iterable[re.Pattern[str]] = ()) -> Traceback | None:
    """The last traceback that is not the echo of another's: whoever waited for the process that failed prints one too,
    after it. Of a chain ('... was the direct cause of ...') the last counts: it is what the engine ended of."""
    hidden = tuple(echoes)
    every = tracebacks(lines)
    real = [each for each in every if not any(pattern.search(each.text) for pattern in hidden)]
    return real[-1] if real else every[-1] if every else None


_VARIES = re.compile(r"0x[0-9a-fA-F]+|\d[\d.,]*|'[^']*'|\"[^\"]*\"|/\S+")


def of_traceback(found: Traceback) -> str:
    """The beginning of the message counts too, without what varies: one validator raises a hundred different errors."""
    return fingerprint(found.exception, found.frames, [steady(found.message)])


def steady(text: str) -> str:
    """The beginning of a sentence without its figures, addresses, paths and quotations."""
    return _VARIES.sub("#", text[:1000])[:80]


def fingerprint(kind: str, frames: Sequence[tuple[str, str]] = (), more: Iterable[str] = ()) -> str:
    """'KIND:12 hex digits'; `kind` is the exception's type, a signal or a code."""
    parts = [kind, *(f"{_PACKAGES.sub('', file)}:{function}" for file, function in frames[-FRAMES:]), *more]
    return f"{kind}:{hashlib.sha256(chr(0).join(parts).encode(errors='replace')).hexdigest()[:12]}"


def series(fingerprints: Sequence[str], newest: str) -> int:
    """How often in a row, the newest included, the same has happened. `fingerprints` are the earlier ones, oldest first."""
    return 1 + sum(1 for _ in _same(reversed(fingerprints), newest))


def _same(backwards: Iterator[str], newest: str) -> Iterator[str]:
    for each in backwards:
        if each != newest or not newest:
            return
        yield each
