"""What a person has chosen in `vllmctl top`, and what each key makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllmd.ctl.top_facts import Facts, Row

SORTS = ("name", "state", "requests", "tokens", "kv")
PAGE = 10
_WORST = ("failed", "restarting", "examining", "killing", "draining", "stopped", "unconfigured")
_ORDERS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: row.name,
    "state": lambda row: (_WORST.index(row.state) if row.state in _WORST else len(_WORST) + (row.state == "ready"), row.name),
    "requests": lambda row: (-(row.running or 0) - (row.waiting or 0), row.name),
    "tokens": lambda row: (-(row.tokens_per_s or 0.0), row.name),
    "kv": lambda row: (-(row.kv_cache_ratio or 0.0), row.name),
}


@dataclass(frozen=True, slots=True)
class View:
    """`selected` is a name, so that it stays where it is when the order changes. `config`: where instances are written."""

    sort: str = "name"
    is_reversed: bool = False
    selected: str = ""
    gpus: bool = True
    details: bool = True
    helps: bool = False
    ascii: bool = False
    config: str = ""
    quits: bool = False


def arranged(rows: Sequence[Row], view: View) -> list[Row]:
    return sorted(rows, key=_ORDERS[view.sort], reverse=view.is_reversed)


def settled(view: View, facts: Facts) -> View:
    """With an instance selected that there is."""
    rows = arranged(facts.rows, view)
    if any(each.name == view.selected for each in rows):
        return view
    return replace(view, selected=rows[0].name if rows else "")


def pressed(view: View, key: str, facts: Facts) -> View:
    """`key`: a character, or up, down, pageup, pagedown, home, end."""
    match key:
        case "q" | "Q":
            return replace(view, quits=True)
        case "?" | "h" | "esc":
            return replace(view, helps=not view.helps and key != "esc")
        case "s" | "S":
            return replace(view, sort=SORTS[(SORTS.index(view.sort) + (1 if key == "s" else -1)) % len(SORTS)])
        case "r":
            return replace(view, is_reversed=not view.is_reversed)
        case "g":
            return replace(view, gpus=not view.gpus)
        case "d" | "\n" | "\r":
            return replace(view, details=not view.details)
    steps = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -PAGE, "pagedown": PAGE, "home": -len(facts.rows), "end": len(facts.rows)}
    return _moved(view, steps[key], facts) if key in steps else view


def _moved(view: View, step: int, facts: Facts) -> View:
    names = [each.name for each in arranged(facts.rows, view)]
    if not names:
        return view
    at = names.index(view.selected) if view.selected in names else 0
    return replace(view, selected=names[max(0, min(len(names) - 1, at + step))])
