"""Text for the cells of a terminal, whoever wrote it: nothing that a terminal obeys, and as wide as it looks.

A name, a log line or a model's id may hold escape sequences, line breaks or characters that turn the reading direction.
"""

from __future__ import annotations

import unicodedata

_HIDDEN = {"Mn", "Me"}
"""Marks drawn onto the character before: hundreds of them would leave their line."""


def clean(text: str) -> str:
    """One line of visible characters."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if char in "\n\t":
        return " "
    return "?" if not char.isprintable() else "" if unicodedata.category(char) in _HIDDEN else char


def width(text: str) -> int:
    """In cells, of clean text."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(char: str) -> int:
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text: str, cells: int) -> str:
    """At most so wide; what is cut off ends with '~'."""
    if width(text) <= cells:
        return text
    if cells <= 0:
        return ""
    kept, used = [], 0
    for char in text:
        used += _cells(char)
        if used > cells - 1:
            break
        kept.append(char)
    return "".join(kept) + "~"


def fit(text: str, cells: int, *, right: bool = False) -> str:
    """Exactly so wide."""
    text = cut(text, cells)
    gap = " " * (cells - width(text))
    return gap + text if right else text + gap
