"""control.sock: what the instance says of itself to local programs, `GET /status` and `GET /metrics`."""

from __future__ import annotations

import json
from collections.abc import Callable

from vllmd.instance.board import Board
from vllmd.instance.metrics import exposition
from vllmd.system.control import ControlServer
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def serve_control(board: Board, journal: Journal | Stderr, lines_dropped: Callable[[], int]) -> ControlServer:
    """Listens beside status.json. TryLater when another supervisor answers there."""

    def status() -> tuple[str, bytes]:
        return "application/json", json.dumps(board.document, ensure_ascii=False).encode()

    def metrics() -> tuple[str, bytes]:
        return METRICS_TYPE, exposition(board, journal_dropped=journal.dropped, lines_dropped=lines_dropped())

    server = ControlServer(board.path.parent / "control.sock", {"/status": status, "/metrics": metrics})
    await server.start()
    return server
