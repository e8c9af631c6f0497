"""`vllmctl top`: all instances and GPUs of this host on one live screen; `--once` and `--json` for pipes.

The screen is curses': it comes with Python, writes only the cells that changed, and knows every terminal that there is. rich would be
no larger (it is in the package), but draws each frame anew and costs ten times the processor time; textual would add 10 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time

from vllmd.config.paths import Paths
from vllmd.ctl import alive, gpu_facts, status
from vllmd.ctl import unit as units
from vllmd.ctl.top_facts import WORDLESS, Gatherer
from vllmd.ctl.top_frame import whole
from vllmd.ctl.top_view import SORTS, View
from vllmd.errors import UsageError
from vllmd.gpu import client

GPU_TIMEOUT_S = 5.0
INTERVAL_S = (0.1, 3600.0)
__all__ = ["SORTS", "top"]


def top(paths: Paths, arguments: argparse.Namespace) -> int:
    gatherer = Gatherer(paths)
    if arguments.json or arguments.once:
        return _once(gatherer, arguments)
    if not INTERVAL_S[0] <= arguments.interval <= INTERVAL_S[1]:
        raise UsageError("interval", f"--interval {arguments.interval:g} is not between {INTERVAL_S[0]:g} and {INTERVAL_S[1]:g} seconds", "the default is 1")
    _need_terminal(paths)
    try:
        from vllmd.ctl import top_screen
    except ImportError as error:  # a Python that was built without it
        raise UsageError("no_curses", f"this Python has no curses ({error})", f"{paths.vllmctl} top --once") from None

    return top_screen.run(gatherer, View(sort=arguments.sort, config=str(paths.config)), arguments.interval)


def _once(gatherer: Gatherer, arguments: argparse.Namespace) -> int:
    look_at_units(gatherer)
    gatherer.host = gpu_facts.seen_in(client.read_once(gatherer.paths, GPU_TIMEOUT_S), gatherer.paths)
    facts = gatherer.facts(time.time())
    if arguments.json:
        sys.stdout.write(json.dumps(facts.as_dict()) + "\n")
        return 0
    columns = max(80, shutil.get_terminal_size((80, 24)).columns)
    view = View(sort=arguments.sort, config=str(gatherer.paths.config), ascii=not writes_utf8())
    sys.stdout.write("\n".join(whole(facts, view, columns)) + "\n")
    return 0


def look_at_units(gatherer: Gatherer) -> None:
    """Which instances there are, and whether their supervisors live: systemd's word, else who listens. May block on systemd."""
    paths = gatherer.paths
    systemd = units.Systemd(paths.scope) if units.runs(paths.scope) else None
    names = status.names(paths, systemd)
    gatherer.units = systemd.show_all(names) if systemd else {}
    lives = [] if systemd else [name for name in names if gatherer.state(name) not in {"", *WORDLESS}]
    gatherer.dead = frozenset(name for name in lives if alive.has_supervisor(paths, name) is False)
    gatherer.names = names


def writes_utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def _need_terminal(paths: Paths) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("no_terminal", "top is a live screen, and this is no terminal", f"{paths.vllmctl} top --once prints one frame, --json the figures")
    if os.environ.get("TERM", "") in ("", "dumb"):
        raise UsageError("dumb_terminal", f"this terminal (TERM={os.environ.get('TERM', '')}) can show no live screen", f"{paths.vllmctl} top --once prints one frame; TERM=xterm, if it can")
