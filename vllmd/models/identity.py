"""Pure: the names that a model has. Every file, link and lock of the store is named by these; they are those that the
existing tools compute, so that both find each other's models."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest


def slug(text: str) -> str:
    """Each run of anything but letters, digits, '.' and '_' becomes one '-': `a--b//c_d é.x` is `a-b-c_d-.x`."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)


def hash12(identity: str) -> str:
    """First 12 hex digits of the SHA-256 of `id` or `id@revision`."""
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def hub_slug(model_id: str) -> str:
    """A model's directory in a hub cache: `models--ORG--NAME`."""
    return "models--" + model_id.replace("/", "--")


def asked(request: ModelRequest) -> str:
    """The identity that names files in the store; a directory of the user's own is its path (its name is not unique)."""
    return request.path or request.identity


def label(request: ModelRequest) -> str:
    """`<slug>.<hash12>`: names a model's files in the store."""
    key = request.path.strip("/")[-80:] if request.path else request.key
    return f"{slug(key)}.{hash12(asked(request))}"


def request_from(settings: Model, default_store: Path) -> ModelRequest:
    """What the settings ask for: an id is ORG/NAME, a name is its last part, a directory's name is its own."""
    name = settings.name or settings.id.rpartition("/")[2] or settings.path.rstrip("/").rpartition("/")[2]
    model_id = settings.id or (f"{settings.org}/{settings.name}" if settings.org and settings.name else "")
    store = Path(settings.dir) if settings.dir else default_store
    return ModelRequest(name, model_id, settings.revision, settings.path, settings.sources, store)
