"""A YAML file as hostile input: plain values with the line of each key, or a ConfigError with the place.

Built from the parser's events and not from its tree: the C composer recurses without a limit, so that a file of open
brackets would end the process. Accepted are mappings, lists and plain scalars. A number is only what looks decimal:
YAML 1.1 would read 0700 as 448, 22:30 as 1350 and 2026-01-01 as a date; such text stays the text that was written.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vllmd.config.values import shown
from vllmd.errors import ConfigError, PermissionMissing, VllmdError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 20_000


class Fraction(float):
    """A number with a point, which remembers how it was written: as text 1.10 is a version and not 1.1."""

    __slots__ = ("written",)
    written: str

    def __new__(cls, written: str) -> Fraction:
        self = super().__new__(cls, written)
        self.written = written
        return self

    def __str__(self) -> str:
        return self.written

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]  # for copy and pickle, which would pass the float
        return (self.written,)


Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})", re.ASCII)
_FRACTION = re.compile(r"[-+]?[0-9]{1,18}\.[0-9]{0,18}([eE][-+][0-9]{1,3})?", re.ASCII)
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **{form: True for word in ("true", "yes", "on") for form in (word, word.title(), word.upper())},
    **{form: False for word in ("false", "no", "off") for form in (word, word.title(), word.upper())},
}
_PLAIN_TAGS = {"tag:yaml.org,2002:str", "!"}


@dataclass(frozen=True, slots=True)
class Document:
    """`lines` gives the line (from 1) of the key or item at a path into `values`. `mode` are the file's permission bits,
    `sha256` names its bytes."""

    where: str
    values: Mapping[str, Any]
    lines: Mapping[tuple[str | int, ...], int]
    mode: int = 0
    sha256: str = ""

    def line(self, *path: str | int) -> int:
        """The line of the key at `path`, or of the nearest one around it that has a line."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def _bad(where: str, line: int, reason: str, hint: str = "") -> ConfigError:
    return ConfigError("yaml_invalid", f"{where}:{line}: {reason}", hint or "correct the file; `vllmd check` reads it again")


def _scalar(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if _DECIMAL.fullmatch(text):
        return int(text)
    return Fraction(text) if _FRACTION.fullmatch(text) else text


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not come yet."""

    value: dict[str, Any] | list[Any]
    path: tuple[str | int, ...]
    anchor: str | None
    first_node: int
    key: str | None = None


@dataclass(slots=True)
class _Builder:
    where: str
    lines: dict[tuple[str | int, ...], int] = field(default_factory=dict)
    stack: list[_Open] = field(default_factory=list)
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)
    nodes: int = 0
    root: Any = None
    documents: int = 0

    def read(self, text: str) -> None:
        loader = Loader(text)
        try:
            while loader.check_event():
                self.take(loader.get_event())
        finally:
            loader.dispose()

    def take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            self.scalar(event, line)
        elif isinstance(event, yaml.AliasEvent):
            self.alias(event, line)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self.open(event, line)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self.close()
        elif isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise _bad(self.where, line, "a second document begins", "keep one document in a file; remove the '---'")

    def count(self, line: int, nodes: int = 1) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise _bad(self.where, line, f"holds more than {MAX_NODES} values (aliases count as what they repeat)")

    def scalar(self, event: Any, line: int) -> None:
        self.count(line)
        if event.tag is not None and event.tag not in _PLAIN_TAGS:
            raise self.tagged(event, line)
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.value, dict) and top.key is None:
            self.key(top, event.value, line)
            return
        value = _scalar(event.value) if event.implicit[0] else event.value
        self.anchor(event.anchor, value, 1)
        self.put(value, line)

    def tagged(self, event: Any, line: int) -> ConfigError:
        return _bad(self.where, line, f"the tag {event.tag!r} is not allowed", "write plain values; quote text that begins with '!'")

    def key(self, top: _Open, key: str, line: int) -> None:
        assert isinstance(top.value, dict)
        if not key.isprintable():
            raise _bad(self.where, line, f"the key {shown(key)} holds a line break or control character")
        if key in top.value:
            earlier = self.lines[(*top.path, key)]
            name = ".".join(str(part) for part in (*top.path, key))
            raise _bad(self.where, line, f"{name}: is given twice, first on line {earlier}", "keep one of the two")
        top.key = key
        self.lines[(*top.path, key)] = line

    def place(self) -> tuple[str | int, ...]:
        """The path of the value that comes next."""
        if not self.stack:
            return ()
        top = self.stack[-1]
        return (*top.path, top.key if isinstance(top.value, dict) and top.key is not None else len(top.value))

    def put(self, value: Any, line: int) -> None:
        if not self.stack:
            self.root = value
            return
        top = self.stack[-1]
        if isinstance(top.value, list):
            self.lines[(*top.path, len(top.value))] = line
            top.value.append(value)
        elif top.key is None:
            raise _bad(self.where, line, "a key must be plain text")
        else:
            top.value[top.key] = value
            top.key = None

    def open(self, event: Any, line: int) -> None:
        self.count(line)
        if event.tag is not None:
            raise self.tagged(event, line)
        if len(self.stack) >= MAX_DEPTH:
            raise _bad(self.where, line, f"is nested deeper than {MAX_DEPTH} levels")
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.value, dict) and top.key is None:
            raise _bad(self.where, line, "a key must be plain text", "quote text that begins with { or [")
        value: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        self.stack.append(_Open(value, self.place(), event.anchor, self.nodes))

    def close(self) -> None:
        done = self.stack.pop()
        self.anchor(done.anchor, done.value, self.nodes - done.first_node + 1)
        self.put(done.value, self.lines.get(done.path, 1))

    def anchor(self, name: str | None, value: Any, nodes: int) -> None:
        if name is not None:
            self.anchors[name] = (value, nodes)

    def alias(self, event: Any, line: int) -> None:
        """An anchor exists from the end of its value on, so that no value can hold itself."""
        if event.anchor not in self.anchors:
            raise _bad(self.where, line, f"*{event.anchor} refers to nothing that ends before it")
        value, nodes = self.anchors[event.anchor]
        self.count(line, nodes)
        self.put(value, line)


def parse(text: str, where: str, *, mode: int = 0, sha256: str = "") -> Document:
    """The one mapping that the text holds; empty text is an empty one. ConfigError (yaml_invalid) with file and line."""
    builder = _Builder(where)
    try:
        builder.read(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.problem, error.context) if part)
        raise _bad(where, mark.line + 1 if mark else 1, f"is not YAML: {reason}") from None
    except yaml.YAMLError as error:
        raise _bad(where, 1, "is not YAML: " + str(error).splitlines()[0]) from None
    values = {} if builder.root is None else builder.root
    if not isinstance(values, dict):
        raise _bad(where, 1, f"must hold keys and values, not {'a list' if isinstance(values, list) else 'plain text'}")
    return Document(where, values, builder.lines, mode, sha256)


def _bytes(path: Path) -> tuple[bytes, int]:
    # O_NONBLOCK: opening a FIFO that somebody put there must not block. Links are an administrator's right here.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError("config_unreadable", f"{path} is not a regular file", "put a plain YAML file there")
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > MAX_BYTES:
        raise ConfigError("config_unreadable", f"{path} is larger than {MAX_BYTES} bytes", "put a plain YAML file there")
    return data, stat.S_IMODE(status.st_mode)


def _unreadable(path: Path, error: OSError) -> VllmdError:
    if isinstance(error, PermissionError):
        return PermissionMissing("config_unreadable", f"{path}: {error.strerror}", f"let the service read it: chgrp vllmd {path} && chmod 0640 {path}")
    return ConfigError("config_unreadable", f"{path}: {error.strerror}", "put a plain YAML file there")


def load(path: Path) -> Document:
    """The document in the file. FileNotFoundError where there is none; ConfigError, PermissionMissing where it is not fit."""
    try:
        data, mode = _bytes(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(str(path), data.count(b"\n", 0, error.start) + 1, "is not UTF-8 text", "save the file as UTF-8") from None
    return parse(text, str(path), mode=mode, sha256=hashlib.sha256(data).hexdigest())
