"""`--middleware MODULE.CLASS`: real ASGI middlewares in front of a server that is none, as far as they decide by themselves.

Each request goes through the stack as vLLM builds it, down to an app that only notes that it was reached. What is answered
before that is the answer.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""


class Stack:
    """The last one named is the outermost."""

    def __init__(self, names: Iterable[str]) -> None:
        self._app: Any = _reach
        for name in names:
            module, _, attribute = name.rpartition(".")
            self._app = getattr(importlib.import_module(module), attribute)(self._app)

    def answer(self, method: str, target: str, headers: Iterable[tuple[str, str]]) -> Answer | None:
        """None for a request that comes through."""
        path, _, query = target.partition("?")
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        scope = {"type": "http", "method": method, "path": path, "query_string": query.encode("latin-1"), "headers": raw, "root_path": "", "reached": False}
        answer = Answer()

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], list(message["headers"])
            else:
                answer.body += message.get("body", b"")

        work = self._app(scope, _receive, send)
        try:
            work.send(None)  # nothing here waits, so one step is all of it
        except StopIteration:
            return None if scope["reached"] else answer
        raise RuntimeError("a middleware that waits for something is beyond this fake")


async def _reach(scope: dict[str, Any], _receive: Any, _send: Any) -> None:
    scope["reached"] = True


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}
