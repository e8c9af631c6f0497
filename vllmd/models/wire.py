"""Pure: what the daemon and the child `python -m vllmd.models.fetch` say to each other. One JSON object in, on one line;
JSON lines out. Progress any number of times, then Resolved, then Verified; or Failed at any point."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllmd import errors
from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest, ResolvedModel
from vllmd.errors import EngineFailed, Status, VllmdError
from vllmd.models.progress import Progress

MAX_REQUEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Resolved:
    """The model is there and its headers are sound: the engine may start."""

    model: ResolvedModel


@dataclass(frozen=True, slots=True)
class Verified:
    """What had to be verified before READY is verified. `manifest_sha256` is '' where nothing had to be hashed."""

    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class Failed:
    error: VllmdError


Event = Progress | Resolved | Verified | Failed


def encode_request(request: ModelRequest, settings: Model) -> bytes:
    """One line for the child's stdin. It carries secrets (hf_token), which is why it is no argument."""
    document = {"request": {**asdict(request), "store": str(request.store)}, "settings": asdict(settings)}
    return json.dumps(document).encode() + b"\n"


def decode_request(line: bytes) -> tuple[ModelRequest, Model]:
    """The child's side; ValueError or TypeError on anything that `encode_request` does not write."""
    document = json.loads(line)
    request = document["request"]
    store, sources = Path(request.pop("store")), tuple(request.pop("sources"))
    settings = document["settings"] | {key: tuple(document["settings"][key]) for key in ("sources", "exclude")}
    return ModelRequest(**request, store=store, sources=sources), Model(**settings)


def encode_event(event: Event) -> bytes:
    match event:
        case Progress():
            document: dict[str, Any] = {"event": "progress", **asdict(event)}
        case Resolved(model):
            document = {"event": "resolved", **asdict(model), "directory": str(model.directory)}
        case Verified(manifest_sha256):
            document = {"event": "verified", "manifest_sha256": manifest_sha256}
        case Failed(error):
            document = {"event": "failed", "error": error.as_dict()}
    return json.dumps(document).encode() + b"\n"


def decode_event(line: bytes | str) -> Event:
    """The daemon's side. Never raises: what is no event is a failure of the child."""
    try:
        document = json.loads(line)
        return _event(document.pop("event"), document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        shown = line[:200].decode("utf-8", "replace") if isinstance(line, bytes) else line[:200]
        return Failed(EngineFailed("resolver_broken", f"the resolver said what is no event: {shown!r}", "This is a bug of vllmd: report it."))


def _event(name: str, document: dict[str, Any]) -> Event:
    match name:
        case "progress":
            _require(document, {"phase": str, "source": str, "done_bytes": int, "total_bytes": int, "text": str, "bytes_per_s": int, "eta_s": int, "level": str})
            return Progress(**document)
        case "resolved":
            _require(document, dict.fromkeys(("identity", "directory", "via", "revision", "manifest_sha256"), str) | {"bytes": int})
            return Resolved(ResolvedModel(**{**document, "directory": Path(document["directory"])}))
        case "verified":
            _require(document, {"manifest_sha256": str})
            return Verified(**document)
        case "failed":
            return Failed(_error(document["error"]))
    raise ValueError(name)


def _require(document: dict[str, Any], types: dict[str, type]) -> None:
    if document.keys() != types.keys() or any(not isinstance(document[key], kind) for key, kind in types.items()):
        raise ValueError("wrong fields")


def _error(document: dict[str, Any]) -> VllmdError:
    """The error of the tree that has this exit status."""
    _require(document, {"code": str, "what": str, "hint": str, "status": int})
    status = Status(document["status"])
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VllmdError)]
    kind = next((kind for kind in kinds if kind is not VllmdError and kind.status is status), VllmdError)
    return kind(document["code"], document["what"], document["hint"], status=status)
