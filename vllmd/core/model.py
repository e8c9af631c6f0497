"""A model: as it is asked for, and as it was found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """Which model is wanted, and where it may come from. `key` is the model part of `identity`: the id, else the name."""

    name: str
    id: str
    revision: str
    path: str
    sources: tuple[str, ...]
    store: Path

    @property
    def selected(self) -> bool:
        return bool(self.name or self.id or self.path)

    @property
    def key(self) -> str:
        return self.id or self.name or self.path

    @property
    def identity(self) -> str:
        return f"{self.key}@{self.revision}" if self.revision else self.key


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that was found and passed validation. `directory` is what the engine is given: a real path, never a link.

    `via` is the source's name; `identity` as asked; `manifest_sha256` names the content ('' while not computed).
    """

    identity: str
    directory: Path
    via: str
    revision: str = ""
    bytes: int = 0
    manifest_sha256: str = ""
