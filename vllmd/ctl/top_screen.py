"""The terminal of `vllmctl top`: curses in one asyncio loop, with what may block (systemd, the GPU driver) elsewhere.

However it ends, the terminal is left as it was found.
"""

from __future__ import annotations

import asyncio
import contextlib
import curses
import locale
import os
import signal
import sys
import time

from vllmd.commandline import INTERRUPTED
from vllmd.core.gpu_findings import Finding
from vllmd.ctl import gpu_facts, top
from vllmd.ctl.top_facts import Facts, Gatherer
from vllmd.ctl.top_frame import Line, frame
from vllmd.ctl.top_view import View, pressed, settled
from vllmd.errors import UsageError, VllmdError
from vllmd.gpu.client import Client
from vllmd.system.threads import in_thread

UNITS_S = 5.0
_KEYS = {
    curses.KEY_UP: "up",
    curses.KEY_DOWN: "down",
    curses.KEY_PPAGE: "pageup",
    curses.KEY_NPAGE: "pagedown",
    curses.KEY_HOME: "home",
    curses.KEY_END: "end",
    27: "esc",
}
_COLOURS = {"good": curses.COLOR_GREEN, "busy": curses.COLOR_CYAN, "warn": curses.COLOR_YELLOW, "bad": curses.COLOR_RED}


def run(gatherer: Gatherer, view: View, interval_s: float) -> int:
    _set_locale()
    curses.set_escdelay(25)
    try:
        window = curses.initscr()
    except curses.error as error:
        raise UsageError("terminal_unknown", f"nothing is known of the terminal TERM={os.environ.get('TERM', '')} ({error})", "TERM=xterm vllmctl top, or vllmctl top --once") from None
    try:
        curses.noecho()
        curses.cbreak()
        window.keypad(True)  # noqa: FBT003 - curses' own
        window.nodelay(True)  # noqa: FBT003
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        return asyncio.run(_Screen(window, gatherer, view, interval_s).run())
    finally:
        with contextlib.suppress(curses.error):
            window.keypad(False)  # noqa: FBT003
            curses.nocbreak()
            curses.echo()
            curses.endwin()


def _set_locale() -> None:
    """ssh brings the names of the client's locales, which this host need not have: LC_ALL=de_DE.UTF-8 where only C.UTF-8 was made."""
    wanted = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or ""
    for name in ("", "C.UTF-8") if "utf" in wanted.lower() else ("",):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            return
    locale.setlocale(locale.LC_ALL, "C")


class _Screen:
    def __init__(self, window: curses.window, gatherer: Gatherer, view: View, interval_s: float) -> None:
        self._window = window
        self._gatherer = gatherer
        encoding = locale.getpreferredencoding(False).lower().replace("-", "")  # noqa: FBT003
        self._view = view if encoding == "utf8" else _in_ascii(view)
        self._interval_s = interval_s
        self._styles = _styles()
        self._facts = Facts(time.time())
        self._drawn: list[Line] = []
        self._size = (0, 0)
        self._again = asyncio.Event()
        self._status: int | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), self._typed)
        for number, status in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 0), (signal.SIGHUP, 0)):
            loop.add_signal_handler(number, self._quit, status)
        loop.add_signal_handler(signal.SIGWINCH, self._resized)
        works = [asyncio.create_task(self._units()), asyncio.create_task(self._gpus())]
        try:
            while self._status is None:
                self._look()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._again.wait(), self._interval_s)
                self._again.clear()
            return self._status
        finally:
            loop.remove_reader(sys.stdin.fileno())
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    def _quit(self, status: int) -> None:
        self._status = status
        self._again.set()

    # -- what others know

    async def _units(self) -> None:
        while True:
            try:
                await in_thread(lambda: top.look_at_units(self._gatherer))
                self._gatherer.note = ""
            except VllmdError as error:
                self._gatherer.note = error.what
            if not self._facts.rows:
                self._again.set()
            await asyncio.sleep(UNITS_S)

    async def _gpus(self) -> None:
        client = Client(self._gatherer.paths)
        try:
            async for said in client.stream():
                if not isinstance(said, Finding):
                    self._gatherer.host = gpu_facts.seen_in(said, self._gatherer.paths)
        finally:
            await client.close()

    # -- what a person does

    def _typed(self) -> None:
        """Until there is no more; a terminal that is gone reads as its end for ever."""
        read = 0
        while (code := self._window.getch()) != curses.ERR:
            read += 1
            if code == ord(" "):
                self._again.set()
            key = _KEYS.get(code) or (chr(code) if 0 < code < 128 else "")
            self._view = pressed(self._view, key, self._facts)
        if not read and not _is_open(sys.stdin.fileno()):
            self._quit(0)
        if self._view.quits:
            self._quit(0)
        self._draw()

    def _resized(self) -> None:
        columns, lines = _size()
        curses.resizeterm(lines, columns)
        self._window.clear()
        self._drawn = []
        self._draw()

    # -- drawing

    def _look(self) -> None:
        self._facts = self._gatherer.facts(time.time())
        self._draw()

    def _draw(self) -> None:
        self._view = settled(self._view, self._facts)
        size = _size()
        if size != self._size:
            self._size, self._drawn = size, []
        columns, lines = size
        shown = frame(self._facts, self._view, columns, lines)
        for number, line in enumerate(shown):
            if number >= len(self._drawn) or self._drawn[number] != line:
                self._put(number, line)
        self._drawn = shown
        self._window.refresh()

    def _put(self, number: int, line: Line) -> None:
        with contextlib.suppress(curses.error):  # the last cell of the screen cannot be written without a complaint
            self._window.move(number, 0)
            for text, style in line:
                self._window.addstr(text, self._styles.get(style, 0))


def _styles() -> dict[str, int]:
    """NO_COLOR (https://no-color.org) leaves bold, dim and reverse."""
    styles = {"title": curses.A_REVERSE | curses.A_BOLD, "head": curses.A_BOLD, "dim": curses.A_DIM, "selected": curses.A_REVERSE, "bad": curses.A_BOLD, "warn": curses.A_BOLD}
    if os.environ.get("NO_COLOR") or not curses.has_colors():
        return styles
    curses.start_color()
    with contextlib.suppress(curses.error):
        curses.use_default_colors()
        for number, (style, colour) in enumerate(_COLOURS.items(), 1):
            curses.init_pair(number, colour, -1)
            styles[style] = styles.get(style, 0) | curses.color_pair(number)
    return styles


def _in_ascii(view: View) -> View:
    from dataclasses import replace

    return replace(view, ascii=True)


def _size() -> tuple[int, int]:
    try:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        columns, lines = 80, 24
    return max(1, columns or 80), max(1, lines or 24)


def _is_open(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False
