"""A download as the tests run it: a listing made of what a server has, a stage, and everything that was said."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.files_server import Content
from vllmd.models.download import Limits, download
from vllmd.models.hashing import Digest
from vllmd.models.progress import Progress
from vllmd.models.remote import Listing, RemoteFile, Request
from vllmd.models.stage import Stage

LIMITS = Limits(connections=4, stall_s=20.0, attempts=4, back_off_s=0.01)
ORIGIN = "s3://bucket/tiny"


def noise(size: int, seed: int = 1) -> bytes:
    chance = random.Random(seed)
    return b"".join(chance.randbytes(min(1 << 24, size - at)) for at in range(0, size, 1 << 24))  # randbytes takes no more than 256 MB


FILES = {"config.json": b'{"a": 1}', "model.safetensors": noise(3_000_000), "sub/deep/tokenizer.json": noise(70_000, 2), "empty": b""}
MODEL = "model.safetensors"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def listing(files: Mapping[str, Content], *, sums: bool = True) -> Listing:
    """With the SHA-256 of each file, or with pins only."""
    return Listing(
        tuple(
            RemoteFile(name, len(content), f"pin-{name}", {"sha256": sha256(content)} if sums and isinstance(content, bytes) else {})
            for name, content in files.items()
        ),
        ORIGIN,
    )


@dataclass(slots=True)
class Plain:
    """A transport: BASE/NAME, with these headers."""

    base: str
    headers: Mapping[str, str] = field(default_factory=dict)
    refusals: Mapping[int, Exception] = field(default_factory=dict)

    def request(self, file: RemoteFile, begin: int, end: int) -> Request:
        return Request(f"{self.base}/{file.name}", {"Range": f"bytes={begin}-{end - 1}", **self.headers})

    def refused(self, file: RemoteFile, status: int, body: bytes) -> Exception | None:
        return self.refusals.get(status)


@dataclass(slots=True)
class Ran:
    """What a download said on its way."""

    store: Path
    lines: list[str] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    digests: Mapping[str, Digest] = field(default_factory=dict)

    @property
    def files(self) -> Path:
        return self.store / ".staging" / "tiny" / "files"

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def fetch(
        self, listed: Listing, transport: Plain, limits: Limits = LIMITS, environ: Mapping[str, str] | None = None
    ) -> Mapping[str, Digest]:
        stage = Stage.open(self.store, "tiny", listed)
        self.digests = download(listed, transport, stage, limits, environ or {}, self.progress.append, self.lines.append)
        return self.digests

    def check(self, files: Mapping[str, Content]) -> None:
        """The files are there, to the byte, and their sums are theirs."""
        assert {str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()} == set(files)
        for name, content in files.items():
            data = (self.files / name).read_bytes()
            assert data == content[:]
            assert self.digests[name].sha256 == sha256(data)
