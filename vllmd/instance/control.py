"""control.sock: what the instance says of itself to local programs, `GET /status` and `GET /metrics`."""

from __future__ import annotations

import json

from vllmd.instance.board import Board
from vllmd.system.control import ControlServer, Route


async def serve_control(board: Board, metrics: Route) -> ControlServer:
    """Listens beside status.json. TryLater when another supervisor answers there."""

    def status() -> tuple[str, bytes]:
        return "application/json", json.dumps(board.document, ensure_ascii=False).encode()

    server = ControlServer(board.path.parent / "control.sock", {"/status": status, "/metrics": metrics})
    await server.start()
    return server
