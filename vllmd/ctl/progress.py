"""A start as it moves: a live bar on a terminal, one line for each change everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vllmd.config.values import printable

_PERCENT_STEP = 0.1


@dataclass(frozen=True, slots=True)
class Shown:
    """What can be said of a start now; `fraction` is None where nothing is known of the whole."""

    phase: str
    fraction: float | None
    text: str


Show = Callable[[Shown], None]


def _plain(text: str) -> str:
    """On one line. It is of the service's account, and the terminal may be root's."""
    return printable(text.replace("\n", " "))


@contextmanager
def progress(name: str) -> Iterator[Show]:
    if sys.stderr.isatty():
        with _bar(name) as show:
            yield show
    else:
        yield _lines(name)


@contextmanager
def _bar(name: str) -> Iterator[Show]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[name]}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None, name=name)

        def show(now: Shown) -> None:
            # What an engine prints may look like markup.
            description = escape(_plain(" ".join(filter(None, (now.phase, now.text if now.text != now.phase else "")))))
            bars.update(task, description=description, total=None if now.fraction is None else 1.0, completed=now.fraction or 0.0)

        yield show


def _lines(name: str) -> Show:
    """Says each phase once, and each tenth of what has a percentage."""
    began = time.monotonic()
    said: tuple[str, int] | None = None

    def show(now: Shown) -> None:
        nonlocal said
        key = (now.phase, -1 if now.fraction is None else int(now.fraction / _PERCENT_STEP))
        if key == said:
            return
        said = key
        percent = "" if now.fraction is None else " ".join(filter(None, (f" {now.fraction:.0%}", now.text)))
        sys.stderr.write(_plain(f"{name}: {now.phase}{percent} ({time.monotonic() - began:.0f} s)") + "\n")
        sys.stderr.flush()

    return show
