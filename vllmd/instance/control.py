"""control.sock: what the instance says of itself to local programs, `GET /status` and `GET /metrics`; `POST /pause` and `/resume`."""

from __future__ import annotations

import json

from vllmd.instance.board import Board
from vllmd.instance.pausing import Pausing
from vllmd.system.control import ControlServer, Route


async def serve_control(board: Board, metrics: Route, pausing: Pausing) -> ControlServer:
    """Listens beside status.json. TryLater when another supervisor answers there."""

    def status() -> tuple[str, bytes]:
        return "application/json", json.dumps(board.document, ensure_ascii=False).encode()

    routes = {"/status": status, "/metrics": metrics}
    actions = {"/pause": pausing.pause, "/resume": pausing.resume}
    server = ControlServer(board.path.parent / "control.sock", routes, actions=actions)
    await server.start()
    return server
