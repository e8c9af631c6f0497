"""A stand-in for the host's GPU service: gpu.sock, whose events a test tells one by one."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any, Self

from vllmd.core.gpu_findings import Finding


class GpuService:
    """Answers GET /events; whoever comes later hears only what is told after it came."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._links: list[socket.socket] = []
        self.has_listener = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._socket.accept()
                link.settimeout(5)
                if b" /events" in link.recv(4096):
                    link.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + _line(snapshot={"schema": 1, "source": "nvml", "gpus": []}))
                    self._links.append(link)
                    self.has_listener.set()
                else:
                    link.close()

    def tell(self, finding: Finding) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.sendall(_line(finding=finding.as_dict()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for link in self._links:
            link.close()


def _line(**words: Any) -> bytes:
    return json.dumps(words).encode() + b"\n"
