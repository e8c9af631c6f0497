"""A pause, asked for on control.sock: nothing is judged or ended while a person works on the engine. It ends by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from vllmd.core import events as ev
from vllmd.core.events import Failure
from vllmd.core.lifecycle import State
from vllmd.instance.board import Board
from vllmd.instance.clockwork import Clockwork
from vllmd.instance.vitals import Vitals
from vllmd.system.control import Reply
from vllmd.system.host import boottime
from vllmd.system.journal import Journal
from vllmd.system.peer import Peer
from vllmd.system.terminal import Stderr

DEFAULT_S = 3600.0
LONGEST_S = 7 * 86400.0
CHECK_S = 5.0
WHY_MAX = 200
PAUSABLE = frozenset({State.STARTING, State.PROVEN, State.READY})


class Pausing:
    """`state` is asked for the instance's; `on_end` is called when a pause has ended."""

    def __init__(
        self,
        board: Board,
        vitals: Vitals,
        journal: Journal | Stderr,
        clockwork: Clockwork,
        *,
        post: Callable[[ev.Event], None],
        state: Callable[[], State],
        on_end: Callable[[], None],
    ) -> None:
        self._board = board
        self._vitals = vitals
        self._journal = journal
        self._clockwork = clockwork
        self._post = post
        self._state = state
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        self._ends_at = 0.0

    def pause(self, body: bytes, peer: Peer) -> Reply:
        """POST /pause with {"for_s": seconds, "why": text}; a second one replaces the first."""
        if self._state() not in PAUSABLE:
            return _reply(409, error=f"the instance is {self._state()}; only a starting or a ready one can be paused")
        try:
            for_s, why = _wish(body)
        except ValueError as error:
            return _reply(400, error=str(error))
        until = datetime.now(UTC) + timedelta(seconds=for_s)
        paused = {"until": until.isoformat(timespec="seconds").replace("+00:00", "Z"), "why": why, "by": str(peer), "pending": ""}
        self._show(paused)
        self._clockwork.at_least(for_s)
        self._cancel()
        self._ends_at = boottime() + for_s
        self._wait(for_s)
        reason = f": {why}" if why else ""
        self._journal.event("paused", f"paused until {paused['until']} by {peer}{reason}", priority=4, uid=peer.uid, pid=peer.pid)
        self._post(ev.Paused())
        return _reply(200, paused=paused)

    def _wait(self, left_s: float) -> None:
        """In short turns: the loop's clock stands still while the machine sleeps, and the one on the wall, which people go by, does not."""
        self._timer = asyncio.get_running_loop().call_later(min(left_s, CHECK_S), self._look)

    def _look(self) -> None:
        left_s = self._ends_at - boottime()
        if left_s > 0:
            self._wait(left_s)
        else:
            self._end("its time is over")

    def resume(self, _body: bytes, peer: Peer) -> Reply:
        if self._vitals.paused is None:
            return _reply(409, error="the instance is not paused")
        self._end(f"by {peer}")
        return _reply(200, paused=None)

    def pending(self, failure: Failure | None) -> None:
        """What has happened to the engine, and will be acted upon when the pause ends."""
        if failure is not None and self._vitals.paused is not None and not self._vitals.paused["pending"]:
            self._show({**self._vitals.paused, "pending": failure.what})
            self._journal.event("would-act", f"will end the instance when the pause does: {failure.what}", priority=4, code=failure.code)

    def forget(self) -> None:
        """The instance ends, and its pause with it."""
        self._cancel()
        if self._vitals.paused is not None:
            self._show(None)

    def _end(self, why: str) -> None:
        self._cancel()
        self._show(None)
        self._clockwork.at_least(0)
        self._journal.event("resumed", f"the watch goes on ({why})", priority=5)
        self._on_end()
        self._post(ev.Resumed())

    def _show(self, paused: dict[str, Any] | None) -> None:
        self._vitals.paused = paused
        self._board.set(paused=paused)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _wish(body: bytes) -> tuple[float, str]:
    """ValueError with a reason for a person."""
    try:
        wish = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise ValueError("the body is no JSON") from None
    for_s = wish.get("for_s", DEFAULT_S) if isinstance(wish, dict) else None
    why = wish.get("why", "") if isinstance(wish, dict) else None
    if not isinstance(for_s, int | float) or isinstance(for_s, bool) or not 0 < for_s <= LONGEST_S:
        raise ValueError(f"for_s must be a number of seconds up to {LONGEST_S:.0f}")
    if not isinstance(why, str):
        raise ValueError("why must be text")
    return float(for_s), " ".join("".join(c if c.isprintable() else " " for c in why).split())[:WHY_MAX]


def _reply(status: int, **document: Any) -> Reply:
    return status, "application/json", json.dumps(document).encode()
