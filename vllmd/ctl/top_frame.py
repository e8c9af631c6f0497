"""The screen of `vllmctl top`, from facts alone: lines of styled text, exactly as wide and as many as asked for.

Nothing here knows a terminal. Every text goes through `cells` once more, so that no frame can hold what a terminal obeys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from vllmd.ctl.cells import clean, cut, fit, width
from vllmd.ctl.top_facts import Card, Facts, Row
from vllmd.ctl.top_view import View, arranged

Style = Literal["", "title", "head", "good", "busy", "warn", "bad", "dim", "selected"]
Line = tuple[tuple[str, Style], ...]
KEYS = "q quit   up/down select   s sort: {sort}   r reverse   g GPUs   d details   ? help"
HELP = (
    "Keys",
    "  q, Ctrl-C          quit",
    "  up, down, k, j     select an instance; home, end, page up, page down",
    "  s, S               sort by the next, the one before: name, state, requests, tokens, kv",
    "  r                  reverse the order",
    "  g, d               GPUs, details of the selected instance: show or hide",
    "  space              look now",
    "Columns",
    "  RUN, WAIT          requests in the engine, and in its queue",
    "  TOK/S, PRMT/S      tokens generated, prompt tokens read, in each second",
    "  KV                 share of the KV cache in use, of the fullest rank",
    "  RST                how often systemd has started it again",
)
SMALL = (24, 4)
_MARKS: Mapping[str, tuple[str, str, Style]] = {
    "ready": ("●", "*", "good"),
    "failed": ("×", "x", "bad"),
    "stopped": ("○", "o", "dim"),
    "unconfigured": ("○", "o", "dim"),
}
_BUSY: tuple[str, str, Style] = ("◐", "~", "busy")
_HEAVY = 0.9
"""From here on a bar is a warning."""
_HOT_C = 85


def frame(facts: Facts, view: View, columns: int, lines: int) -> list[Line]:
    """Exactly `lines` lines of exactly `columns` cells."""
    if columns < SMALL[0] or lines < SMALL[1]:
        shown: list[Line] = [_line([(cut(f"too small: {columns}x{lines}", columns), "")], columns, view)]
    else:
        body = _help(columns, lines - 2) if view.helps else _body(facts, view, columns, lines - 2)
        keys = KEYS.format(sort=view.sort) if not view.helps else "? back   q quit"
        shown = [_title(facts, view, columns), *(_line(each, columns, view) for each in body)]
        shown += [_line([("", "")], columns, view)] * (lines - 1 - len(shown)) + [_line([(keys, "dim")], columns, view)]
    blank = _line([("", "")], columns, view)
    return (shown + [blank] * lines)[:lines]


def whole(facts: Facts, view: View, columns: int) -> list[str]:
    """Everything as plain lines, for a pipe."""
    rows = arranged(facts.rows, view)
    body: list[Sequence[tuple[str, Style]]] = [*_instances(rows, view, columns, facts, -1)]
    if facts.cards or facts.gpu_note:
        body += [[("", "")], *_gpus(facts, view, columns, len(facts.cards) + 2)]
    return ["".join(text for text, _ in line).rstrip() for line in (_title(facts, view, columns), *(_line(each, columns, view) for each in body))]


# -- the parts of a screen


def _body(facts: Facts, view: View, columns: int, lines: int) -> Iterator[Sequence[tuple[str, Style]]]:
    rows = arranged(facts.rows, view)
    selected = next((each for each in rows if each.name == view.selected), None)
    details = [*_details(selected, facts, columns, view)] if selected and view.details and lines >= 12 else []
    details = details[: 7 if lines >= 17 else 3]
    room = lines - len(details)
    wanted = 1 + max(1, len(facts.cards)) if view.gpus and (facts.cards or facts.gpu_note) and room >= 6 else 0
    gpus = min(wanted, max(room // 2, room - len(rows) - 2))
    listed = room - gpus - (1 if gpus else 0)
    offset = _offset(rows, view, listed - 1)
    yield from _instances(rows[offset : offset + max(0, listed - 1)], view, columns, facts, offset)
    if gpus:
        yield [("", "")]
        yield from _gpus(facts, view, columns, gpus)
    for _ in range(listed - len(rows[offset : offset + max(0, listed - 1)]) - 1):
        yield [("", "")]
    yield from details


def _offset(rows: Sequence[Row], view: View, room: int) -> int:
    """The selected one is in sight, a little above the end."""
    index = next((number for number, each in enumerate(rows) if each.name == view.selected), 0)
    return max(0, min(index - room + 2, len(rows) - room)) if room > 0 else 0


def _title(facts: Facts, view: View, columns: int) -> Line:
    states = [each.state for each in facts.rows]
    told = [f"{states.count(state)} {word}" for state, word in (("ready", "ready"), ("failed", "failed"), ("stopped", "stopped")) if state in states]
    other = sum(state not in ("ready", "failed", "stopped") for state in states)
    told += [f"{other} on the way"] if other else []
    words = [f"vllmctl top  {facts.host}", ", ".join(told) or "no instances"]
    tokens = [each.tokens_per_s for each in facts.rows if each.tokens_per_s is not None]
    words += [f"{sum(tokens):.0f} tokens/s"] if tokens else []
    words += [facts.note] if facts.note else []
    clock = f"{datetime.fromtimestamp(facts.at).astimezone():%H:%M:%S}"
    left = fit(clean("   ".join(words)), columns - len(clock) - 1)
    return _line([(f"{left} {clock}", "title")], columns, view)


def _help(columns: int, lines: int) -> list[Sequence[tuple[str, Style]]]:
    return [[(cut(text, columns), "head" if not text.startswith(" ") else "")] for text in HELP[:lines]]


# -- instances


@dataclass(frozen=True, slots=True)
class _Layout:
    name: int
    kv_bar: int
    prompts: bool
    memory: bool
    restarts: bool
    since: bool
    rest: int


def _layout(columns: int, rows: Sequence[Row]) -> _Layout:
    name = min(max(8, *(width(each.name) for each in rows), 4) if rows else 8, 14 if columns < 100 else 28)
    broad, wide, wider = columns >= 96, columns >= 110, columns >= 130
    fixed = 2 + name + 1 + 12 + 5 + 5 + 7 + 5
    more = (11 if wide else 0) + (20 if wider else 0) + (11 if broad else 0)
    rest = columns - fixed - more - 2
    if rest < 4:  # very narrow: the figures matter more than words
        return _Layout(min(name, 10), 0, prompts=False, memory=False, restarts=False, since=False, rest=max(0, columns - fixed + name - min(name, 10) - 2))
    return _Layout(name, 10 if wide else 0, prompts=wider, memory=wider, restarts=broad, since=broad, rest=rest)


def _instances(rows: Sequence[Row], view: View, columns: int, facts: Facts, offset: int) -> Iterator[Sequence[tuple[str, Style]]]:
    layout = _layout(columns, facts.rows)
    if not facts.rows:
        yield [(f"no instances: write {view.config or '/etc/vllmd'}/NAME.yaml, then vllmctl start NAME", "dim")]
        return
    yield [(_head(layout, more=_more(len(facts.rows), offset, len(rows))), "head")]
    for row in rows:
        spans = _row(row, layout, view, facts.at)
        if row.name == view.selected and offset >= 0:
            yield [("".join(text for text, _ in spans), "selected")]
        else:
            yield spans


def _more(count: int, offset: int, shown: int) -> str:
    return f"{offset + 1}-{offset + shown} of {count}" if offset >= 0 and shown < count else ""


def _head(layout: _Layout, more: str) -> str:
    columns = [f"  {fit('NAME', layout.name)} {fit('STATE', 11)}"]
    columns += [fit("SINCE", 6, right=True)] if layout.since else []
    columns += [f"{'RUN':>4} {'WAIT':>4} {'TOK/S':>6}"]
    columns += [f"{'PRMT/S':>7}"] if layout.prompts else []
    columns += [fit("KV", layout.kv_bar + 5) if layout.kv_bar else f"{'KV':>4}"]
    columns += [fit("GPU MEM", 11)] if layout.memory else []
    columns += ["RST"] if layout.restarts else []
    return " ".join(columns) + f" {more or 'WHAT'}"


def _row(row: Row, layout: _Layout, view: View, at: float) -> list[tuple[str, Style]]:
    mark, plain, style = _MARKS.get(row.state, _BUSY)
    waits: Style = "warn" if row.waiting else ""
    full: Style = "warn" if (row.kv_cache_ratio or 0) >= _HEAVY else ""
    spans: list[tuple[str, Style]] = [
        (plain if view.ascii else mark, style),
        (f" {fit(row.name, layout.name)} ", ""),
        (fit("paused" if row.paused_until else row.state, 11), "warn" if row.paused_until else style),
        (f" {_ago(at, row.since):>6}" if layout.since else "", "dim"),
        (f" {_count(row.running):>4}", ""),
        (f" {_count(row.waiting):>4}", waits),
        (f" {_rate(row.tokens_per_s):>6}", ""),
        (f" {_rate(row.prompt_tokens_per_s):>7}" if layout.prompts else "", ""),
        (" " + (fit(_bar(row.kv_cache_ratio, layout.kv_bar, view) + f" {_share(row.kv_cache_ratio):>4}", layout.kv_bar + 5) if layout.kv_bar else f"{_share(row.kv_cache_ratio):>4}"), full),
        (" " + fit(_memory(row.gpu_used_mib, row.gpu_total_mib), 11) if layout.memory else "", ""),
        (f" {_count(row.restarts):>3}" if layout.restarts else "", "warn" if row.restarts else ""),
        (" ", ""),
    ]
    return [*spans, _what(row, layout.rest, view, at)]


def _what(row: Row, room: int, view: View, at: float) -> tuple[str, Style]:
    """The one thing to know of it."""
    if row.error:
        return cut(row.error, room), "bad"
    if row.fraction is not None:
        bar = _bar(row.fraction, min(12, max(0, room - 20)), view)
        return cut(" ".join(filter(None, (bar, f"{row.fraction:.0%}", row.phase, row.progress))), room), "busy"
    if row.phase:
        return cut(" ".join(dict.fromkeys(filter(None, (row.phase, row.progress)))), room), "busy"
    if row.paused_until:
        return cut(f"until {row.paused_until}", room), "warn"
    if row.state == "unconfigured":
        return cut("no model selected", room), "warn"
    if row.event:
        severe = row.event_priority <= 4
        return cut(f"{_ago(at, row.event_at)} {row.event_text if severe or room >= 30 else row.event}".strip(), room), "warn" if severe else "dim"
    return cut(row.model, room), "dim"


def _details(row: Row, facts: Facts, columns: int, view: View) -> Iterator[Sequence[tuple[str, Style]]]:
    names = {card.uuid: str(card.index) for card in facts.cards}
    gpus = ", ".join(names.get(uuid, uuid[:12]) for uuid in row.gpus)
    since = f", {_ago(facts.at, row.since)}" if row.since else ""
    yield [(_rule(f"{row.name}: {row.state}{since}", columns, view), "head")]
    if row.error:
        yield [("error     ", "dim"), (cut(row.error, columns - 10), "bad")]
    if row.error and row.hint:
        yield [("hint      ", "dim"), (cut(row.hint, columns - 10), "")]
    if row.model:
        yield [("model     ", "dim"), (cut(row.model, columns - 10), "")]
    if row.endpoint:
        yield [("endpoint  ", "dim"), (cut(row.endpoint + (f"   GPUs {gpus}" if gpus else ""), columns - 10), "")]
    for warning in row.warnings[:1]:
        yield [("warning   ", "dim"), (cut(warning, columns - 10), "warn")]
    if row.event:
        text = f"{_ago(facts.at, row.event_at)} ago: {row.event_text}" if row.event_at else row.event_text
        yield [("event     ", "dim"), (cut(text, columns - 10), "warn" if row.event_priority <= 4 else "")]


# -- GPUs


def _gpus(facts: Facts, view: View, columns: int, lines: int) -> Iterator[Sequence[tuple[str, Style]]]:
    bar = 10 if columns < 100 else 20
    name = min(max([3, *(width(each.name) for each in facts.cards)]), 18 if columns < 100 else 30)
    yield [(f"GPU {fit('NAME', name)} {fit('MEMORY', bar + 12)} {'UTIL':>4} {'TEMP':>5} {fit('STATE', 11)} OWNER", "head")]
    if not facts.cards:
        yield [(cut(facts.gpu_note, columns), "dim")]
        return
    fits = lines - 1 if len(facts.cards) <= lines - 1 else lines - 2
    for card in facts.cards[:fits]:
        yield _card(card, view, name, bar)
    if len(facts.cards) > fits:
        yield [(f"... {len(facts.cards) - fits} more: vllmctl gpu", "dim")]


def _card(card: Card, view: View, name: int, bar: int) -> list[tuple[str, Style]]:
    share = card.used_mib / card.total_mib if card.used_mib is not None and card.total_mib else None
    state: Style = "bad" if not card.is_usable else "good" if card.state in ("leased", "in use", "free") else "warn"
    return [
        (f"{card.index if card.index >= 0 else '?':>3} {fit(card.name, name)} ", ""),
        (fit(_bar(share, bar, view) + " " + _memory(card.used_mib, card.total_mib), bar + 12), ""),
        (f" {'-' if card.utilization_pct is None else f'{card.utilization_pct}%':>4}", ""),
        (f" {'-' if card.temperature_c is None else f'{card.temperature_c}C':>5} ", "warn" if (card.temperature_c or 0) >= _HOT_C else ""),
        (fit(card.state, 11), state),
        (" " + ", ".join(card.owners), ""),
    ]


# -- words and bars


def _rule(text: str, columns: int, view: View) -> str:
    dash = "-" if view.ascii else "─"
    shown = f"{dash * 2} {cut(text, columns - 6)} "
    return shown + dash * (columns - width(shown))


def _bar(share: float | None, cells: int, view: View) -> str:
    if share is None or cells <= 0:
        return " " * max(0, cells)
    full, empty = ("#", ".") if view.ascii else ("█", "·")
    filled = round(max(0.0, min(1.0, share)) * cells)
    return full * filled + empty * (cells - filled)


def _count(number: int | None) -> str:
    return "-" if number is None else str(number) if abs(number) < 10000 else f"{number // 1000}k"[:4]


def _rate(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:.1f}" if number < 1000 else f"{number / 1000:.1f}k" if number < 1e6 else f"{number / 1e6:.0f}M"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{max(0.0, min(1.0, share)):.0%}"


def _memory(used_mib: int | None, total_mib: int | None) -> str:
    return "-" if used_mib is None or total_mib is None else f"{used_mib / 1024:.1f}/{total_mib / 1024:.0f}G"


def _ago(at: float, moment: float | None) -> str:
    if moment is None:
        return ""
    seconds = max(0, int(at - moment))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _line(spans: Sequence[tuple[str, Style]], columns: int, view: View) -> Line:
    """Exactly `columns` wide, and nothing in it but visible characters."""
    kept: list[tuple[str, Style]] = []
    left = columns
    for text, style in spans:
        shown = clean(text)
        shown = "".join(char if char.isascii() else "?" for char in shown) if view.ascii else shown
        shown = cut(shown, left) if width(shown) > left else shown
        if shown:
            kept.append((shown, style))
            left -= width(shown)
    fill: Style = kept[-1][1] if kept and kept[-1][1] in ("selected", "title") else ""
    return (*kept, (" " * left, fill)) if left else tuple(kept)
