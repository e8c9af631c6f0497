"""vllmctl's side of control.sock: one request to the supervisor of an instance."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from pathlib import Path
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.values import finite_json
from vllmd.errors import PermissionMissing, TryLater
from vllmd.system.unixpath import opened

TIMEOUT_S = 10.0
BE_ADMIN = "as root, or as a member of the group vllmd-admin"


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """To this very socket: a link in its place could send root's words to any other service."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        with opened(self._path) as address:
            self.sock.connect(address)


def ask(paths: Paths, name: str, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """(status, text). PermissionMissing; TryLater with the code `not_running` where there is no supervisor."""
    where = paths.instance_runtime(name) / "control.sock"
    try:
        with contextlib.closing(_Connection(where)) as connection:
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read(1 << 16).decode(errors="replace").strip()
    except PermissionError:
        raise PermissionMissing("control_socket_refused", f"you may not speak to the supervisor of {name} ({where})", BE_ADMIN) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise TryLater("not_running", f"{name} has no running supervisor ({where})", f"{paths.vllmctl} status {name}") from None
    except (OSError, http.client.HTTPException) as error:
        raise TryLater("control_socket_failed", f"the supervisor of {name} does not answer: {error}", f"{paths.vllmctl} status {name}") from None


def decoded(text: str) -> dict[str, Any]:
    """{} for what is no JSON object."""
    try:
        document = finite_json(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
