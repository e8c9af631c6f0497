"""`.vllm-model-provenance`, which the existing tools leave in a model they fetched: key=value lines that say whose model the
directory holds. Hostile input like the rest of the directory; it only ever rules a directory out. What we publish gets one
too, and the `.complete` of the oldest tools, so that they take it for theirs."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from vllmd.core.model import ModelRequest
from vllmd.models.contents import Contents
from vllmd.models.identity import hash12
from vllmd.system.files import read_small, write_atomic

FILE = ".vllm-model-provenance"
COMPLETE = ".complete"
LIMIT_BYTES = 65536


def read(directory: Path) -> Mapping[str, str] | None:
    """Its lines; None where there is no such file. OSError where it cannot be read."""
    try:
        text = read_small(directory / FILE, LIMIT_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EINVAL, errno.EFBIG):
            return {}  # a link, a fifo, a giant: there is a file, and it speaks for no model
        raise
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))


def mismatch(found: Mapping[str, str], request: ModelRequest) -> str:
    """'' where it speaks for the model that is asked, else how it differs."""
    expected = {
        "complete": "1",
        "model_identity": request.identity,
        "model_id": request.key,
        "model_revision": request.revision,
    }
    for key, value in expected.items():
        if found.get(key, "") != value:
            return f"{key} is {found.get(key, '')[:100]!r} and not {value!r}"
    if found.get("identity_hash", "")[:12] != hash12(request.identity):
        return "identity_hash is another model's"
    if request.name and found.get("model", request.name) != request.name:
        return f"model is {found['model'][:100]!r} and not {request.name!r}"
    return ""


def write(directory: Path, request: ModelRequest, contents: Contents) -> None:
    """Both files, for what `request` asked and `contents` describes. OSError."""
    lines = {
        "schema": "1",
        "complete": "1",
        "model": request.name,
        "model_id": request.key,
        "model_identity": request.identity,
        "identity_hash": hash12(request.identity),
        "model_revision": request.revision,
        "resolved_via": contents.source,
        "detail": contents.origin,
        "created_at": contents.created_at,
    }
    text = "".join(f"{key}={_one_line(value)}\n" for key, value in lines.items())
    write_atomic(directory / FILE, text.encode("utf-8", "surrogateescape"))
    write_atomic(directory / COMPLETE, b"")


def _one_line(value: str) -> str:
    return "".join(char for char in value if char.isprintable() or not char.isascii())
