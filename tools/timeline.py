"""Draws docs/pictures/start.svg from docs/pictures/start.json, two recorded starts: `python -m tools.timeline`.

tests/engine/test_start_picture.py records them. Pure but for main: a Recording in, the text of an SVG out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"

OURS, ENGINE, BESIDE = "#6cc7d6", "#7fca7f", "#e2b85c"
NAMES: Mapping[str, tuple[str, str]] = {
    "created": ("vllmd starts", OURS),
    "checking": ("port, GPUs, host", OURS),
    "resolve": ("find the model", OURS),
    "lock": ("wait for another resolution", OURS),
    "fetch": ("fetch it", OURS),
    "spawn": ("vLLM: Python imports", ENGINE),
    "importing": ("vLLM: Python imports", ENGINE),
    "verify": ("every byte verified", BESIDE),
    "configuring": ("vLLM: configuration", ENGINE),
    "starting-engine": ("vLLM: engine process", ENGINE),
    "loading-weights": ("vLLM: load weights", ENGINE),
    "compiling": ("vLLM: compile", ENGINE),
    "allocating-kv-cache": ("vLLM: KV cache", ENGINE),
    "capturing-graphs": ("vLLM: capture graphs", ENGINE),
    "starting-server": ("vLLM: server", ENGINE),
    "proof": ("proof of life", OURS),
}
"""Phases as status.json names them: for people, and whose time it is."""


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds since the supervisor was started."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Start:
    title: str
    spans: tuple[Span, ...]
    ready: float


@dataclass(frozen=True, slots=True)
class Recording:
    """`machine`: what it was recorded with, for the line below the picture."""

    machine: str
    starts: tuple[Start, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read(text: str) -> Recording:
    said = json.loads(text)
    starts = tuple(Start(each["title"], tuple(Span(**span) for span in each["spans"]), each["ready"]) for each in said["starts"])
    return Recording(said["machine"], starts)


WIDTH, LEFT, RIGHT, ROW, HEAD, FOOT, MARGIN = 860, 190, 64, 22, 58, 42, 16
FIGURE = 50
"""What a figure needs behind its bar."""
BACK, FORE, FAINT, GRID = "#1b1f24", "#d5dae0", "#8b95a1", "#333b44"
KEY = ((OURS, "vllmd"), (ENGINE, "vLLM"), (BESIDE, "beside it"))


def svg(recording: Recording) -> str:
    """A block for each start, one below the other, with one scale; a row for each phase, with what it took. On a ground of its own, so that
    it can be read on pages of any colour."""
    scale = (WIDTH - LEFT - RIGHT - 2 * MARGIN) / max(start.ready for start in recording.starts)
    blocks: list[str] = []
    top = float(MARGIN)
    for start in recording.starts:
        blocks += _block(start, top, scale)
        top += HEAD + ROW * len(start.spans) + MARGIN
    height = top + FOOT
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}">',
            f'<rect width="100%" height="100%" rx="8" fill="{BACK}"/>',
            '<g font-family="DejaVu Sans,Helvetica,Arial,sans-serif" font-size="13">',
            *blocks,
            *_key(top + 8),
            _text(MARGIN, top + 30, recording.machine, FAINT, size=11),
            "</g>",
            "</svg>",
            "",
        ]
    )


def _block(start: Start, top: float, scale: float) -> Iterator[str]:
    left, bottom = MARGIN + LEFT, top + HEAD + ROW * len(start.spans)
    yield _text(MARGIN, top + 16, start.title, FORE, size=15, weight="bold")
    for second in _ticks(start.ready):
        x = left + second * scale
        yield f'<line x1="{x:.1f}" y1="{top + HEAD - 10:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="{GRID}"/>'
        yield _text(x, top + HEAD - 16, f"{second:g} s", FAINT, size=11, anchor="middle")
    x = left + start.ready * scale
    yield f'<line x1="{x:.1f}" y1="{top + HEAD - 10:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="{FORE}" stroke-width="2"/>'
    yield _text(x, top + 18, f"READY {start.ready:.1f} s", FORE, anchor="middle", weight="bold")
    for row, span in enumerate(start.spans):
        yield from _row(span, top + HEAD + row * ROW, left, left + start.ready * scale, scale)


def _row(span: Span, top: float, left: float, last: float, scale: float) -> Iterator[str]:
    """What it took stands behind the bar, or before it where READY would cross it out."""
    words, colour = NAMES[span.name]
    x, wide = left + span.begin * scale, max(2.0, (span.end - span.begin) * scale)
    yield _text(MARGIN, top + 15, words, FORE)
    yield f'<rect x="{x:.1f}" y="{top + 4:.1f}" width="{wide:.1f}" height="{ROW - 8}" rx="2" fill="{colour}"/>'
    fits = x + wide + FIGURE < last
    yield _text(x + wide + 6 if fits else x - 6, top + 15, _took(span.end - span.begin), FAINT, size=11, anchor="start" if fits else "end")


def _key(top: float) -> Iterator[str]:
    for number, (colour, words) in enumerate(KEY):
        x = MARGIN + number * 110
        yield f'<rect x="{x}" y="{top - 9:.1f}" width="12" height="12" rx="2" fill="{colour}"/>'
        yield _text(x + 18, top + 2, words, FORE, size=12)


def _ticks(last: float) -> Iterator[float]:
    """At most eight, at 1, 2 or 5 times a power of ten; none where READY is said."""
    step = next(size * 10.0**power for power in range(-2, 5) for size in (1, 2, 5) if last / (size * 10.0**power) <= 8)
    yield from (number * step for number in range(math.floor(last / step) + 1))


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2f} s"


def _text(x: float, y: float, words: str, fill: str, *, size: int = 13, anchor: str = "start", weight: str = "normal") -> str:
    more = (f' text-anchor="{anchor}"' if anchor != "start" else "") + (f' font-weight="{weight}"' if weight != "normal" else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}"{more}>{escape(words)}</text>'


if __name__ == "__main__":
    (PICTURES / "start.svg").write_text(svg(read((PICTURES / "start.json").read_text())))
