"""control.sock: what the instance says of itself to local programs, `GET /status` and `GET /metrics`; `GET /keys`, which keys are in
force; `POST /pause`, `/resume`, and `/keys`: look at them again."""

from __future__ import annotations

import json
from collections.abc import Callable

from vllmd.instance.access import Access, NoAccess
from vllmd.instance.board import Board
from vllmd.instance.pausing import Pausing
from vllmd.system.control import ControlServer, Route


async def serve_control(board: Board, metrics: Route, pausing: Pausing, access: Callable[[], Access | NoAccess]) -> ControlServer:
    """Listens beside status.json. TryLater when another supervisor answers there."""

    def status() -> tuple[str, bytes]:
        return "application/json", json.dumps(board.shown(), ensure_ascii=False).encode()

    routes = {"/status": status, "/metrics": metrics, "/keys": lambda: access().document()}
    actions = {"/pause": pausing.pause, "/resume": pausing.resume, "/keys": lambda body, peer: access().post(body, peer)}
    server = ControlServer(board.path.parent / "control.sock", routes, actions=actions)
    await server.start()
    return server
