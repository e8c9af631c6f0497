"""One part of an incident while it is gathered: text up to a limit, and why something is missing from it.

Whoever gathers may hang half-way (a /proc file, a driver, a disk): what is on the sheet by then is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from vllmd.system.terminal import printable


@dataclass(slots=True)
class Sheet:
    """`name` is the file's. `add` may be called from any thread; nothing is taken once it is closed or full."""

    name: str
    limit_bytes: int
    note: str = ""
    _pieces: list[str] = field(default_factory=list)
    _left: int = -1
    _closed: bool = False

    def add(self, text: str) -> bool:
        """False when no more is taken."""
        if self._closed or not text:
            return not self._closed
        if self._left < 0:
            self._left = self.limit_bytes
        raw = text.encode(errors="replace")
        if len(raw) > self._left:
            text = raw[: self._left].decode(errors="ignore")
            self.note = self.note or f"cut at {self.limit_bytes} bytes"
            self._closed = True
        self._pieces.append(text)
        self._left -= min(len(raw), self._left)
        return not self._closed

    def close(self) -> None:
        self._closed = True

    @property
    def text(self) -> str:
        """Without control characters: people read it in a terminal."""
        return "\n".join(map(printable, "".join(self._pieces).split("\n")))


async def gathered(sheet: Sheet, seconds: float, work: Callable[[Sheet], Awaitable[None]]) -> Sheet:
    """The sheet after the work, or after so many seconds; never an exception."""
    try:
        await asyncio.wait_for(work(sheet), seconds)
    except TimeoutError:
        sheet.note = sheet.note or f"not finished within {seconds:g} s"
    except Exception as error:
        sheet.note = sheet.note or f"{type(error).__name__}: {error}"[:400]
    sheet.close()
    return sheet
