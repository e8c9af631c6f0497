"""One question to the host's GPU service, by gpu.sock. Apart from gpu/client, which is slow to import: `vllmd check` asks it too."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from vllmd.config.paths import Paths
from vllmd.system.unixpath import short

Snapshot = dict[str, Any]
"""The GPU document (docs/gpu.md): {"schema": 1, "source", "gpus": [...], ...}."""
_LINE_BYTES = 4 << 20
_CHUNK = 1 << 16


def ask(paths: Paths, timeout_s: float) -> Snapshot | None:
    """What it knows; None where nobody answers within that time."""
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as link:
        link.settimeout(timeout_s)
        with short(paths.gpu_socket) as name:
            link.connect(name)
        link.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        data = bytearray()
        while len(data) < _LINE_BYTES and (left := deadline - time.monotonic()) > 0:
            link.settimeout(left)
            if not (piece := link.recv(_CHUNK)):
                break
            data += piece
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        return document(object_of(body)) if b" 200 " in head.split(b"\r\n", 1)[0] else None
    return None


def object_of(line: bytes) -> Mapping[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        words = json.loads(line)
        if isinstance(words, dict):
            return words
    return {}


def document(words: object) -> Snapshot | None:
    """None for what is no document. What stands in it is read as hostile where it is used."""
    if not isinstance(words, dict) or words.get("schema") != 1 or not isinstance(words.get("gpus"), list):
        return None
    return {**words, "gpus": [gpu for gpu in words["gpus"] if isinstance(gpu, dict)]}
