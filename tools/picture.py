"""A terminal's screen, as pyte has it, as a small SVG for the documentation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape

CELL = (8.4, 18.0)
MARGIN = 12.0
_BACK, _FORE, _FAINT = "#1b1f24", "#d5dae0", "#7d8792"
_WORDS = re.compile(r"\S+(?: \S+)*")
"""Each stands at its own cell: not every viewer's font is as wide as ours."""
_COLOURS = {"green": "#7fca7f", "cyan": "#6cc7d6", "brown": "#e2b85c", "yellow": "#e2b85c", "red": "#f0767a"}


def svg(screen: Any) -> str:
    """One text element for each run of cells that look the same."""
    width, height = screen.columns * CELL[0] + 2 * MARGIN, screen.lines * CELL[1] + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">',
        f'<rect width="100%" height="100%" rx="8" fill="{_BACK}"/>',
        '<g font-family="DejaVu Sans Mono,Menlo,Consolas,monospace" font-size="14" xml:space="preserve">',
    ]
    for line in range(screen.lines):
        parts += _line(screen, line)
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _line(screen: Any, line: int) -> Iterator[str]:
    cells = [screen.buffer[line][column] for column in range(screen.columns)]
    y = MARGIN + line * CELL[1]
    for look, run in itertools.groupby(enumerate(cells), key=lambda each: _look(each[1])):
        fore, back, bold = look
        members = list(run)
        text = "".join(cell.data for _, cell in members)
        x, wide = MARGIN + members[0][0] * CELL[0], len(members) * CELL[0]
        if back:
            yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{CELL[1]:g}" fill="{back}"/>'
        for words in _WORDS.finditer(text):
            shown, at, length = words[0], x + words.start() * CELL[0], len(words[0]) * CELL[0]
            weight = ' font-weight="bold"' if bold else ""
            yield f'<text x="{at:.1f}" y="{y + 13.5:.1f}" textLength="{length:.1f}" fill="{fore}"{weight}>{escape(shown)}</text>'


def _look(cell: Any) -> tuple[str, str, bool]:
    fore = _COLOURS.get(cell.fg, _FORE)
    if cell.reverse:
        return _BACK, _FORE if cell.fg == "default" else fore, cell.bold
    return fore, "", cell.bold
