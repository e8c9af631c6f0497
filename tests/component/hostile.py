"""A store that has a good model published, a source that turns bad, and what must then still hold."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests import publishing, tiny_models
from tests.fakes import s3_server
from tests.fakes.hub import FakeHub
from tests.fakes.s3_server import S3Server
from vllmd.config.settings import Model
from vllmd.models import demo, wire
from vllmd.models.identity import label
from vllmd.models.progress import Progress
from vllmd.models.resolve import resolve

ID = "acme/Tiny"
ROOT = Path(__file__).parents[2]
FETCH = [sys.executable, "-m", "vllmd.models.fetch"]
INDEX = "model.safetensors.index.json"
SHARD1, SHARD2 = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
Files = dict[str, bytes]


def environ(home: Path, **more: str) -> dict[str, str]:
    """Of the child: nothing of the person's who runs the tests."""
    keys = {"AWS_ACCESS_KEY_ID": "AKIATESTING", "AWS_SECRET_ACCESS_KEY": "verysecret+/key", "AWS_EC2_METADATA_DISABLED": "true"}
    return {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "HOME": str(home), "HF_TOKEN": "", **keys, **more}


@dataclass(frozen=True)
class Outcome:
    """Of one child: `raw` is all that it wrote to both of its streams."""

    status: int
    events: list[wire.Event]
    stderr: bytes
    raw: str

    @property
    def failed(self) -> wire.Failed:
        assert isinstance(self.events[-1], wire.Failed), self.events[-1]
        return self.events[-1]

    def said(self, text: str) -> bool:
        return any(text in event.text for event in self.events if isinstance(event, Progress))


def run(asked: Any, settings: Model, variables: Mapping[str, str], wrap: tuple[str, ...] = (), timeout_s: float = 60) -> Outcome:
    """The child as the daemon starts it, to its end."""
    command = [*wrap, *FETCH]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables) as child:
        try:
            assert child.stdin
            child.stdin.write(wire.encode_request(asked, settings))
            child.stdin.flush()
            stdin, child.stdin = child.stdin, None  # communicate would close it, which ends the child
            with stdin:
                out, err = child.communicate(timeout=timeout_s)
        finally:
            child.kill()
    events = [wire.decode_event(line) for line in out.splitlines()]
    return Outcome(child.returncode, events, err, (out + err).decode(errors="replace"))


@dataclass
class World:
    """`around` holds the store and, beside it, what must never change."""

    around: Path
    settings: Model
    source: str
    set_content: Callable[[Mapping[str, bytes]], None]
    generation: int = 0
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.around / "store"

    @property
    def asked(self) -> Any:
        return tiny_models.request(self.store, ID, sources=(self.source,))

    @property
    def link(self) -> Path:
        return self.store / label(self.asked)

    def good(self) -> Files:
        """The next good version: one shard and a note differ from the version before."""
        self.generation += 1
        files = dict(BASE)
        files["notes.txt"] = f"version {self.generation}\n".encode()
        shard = bytearray(files[SHARD2])
        shard[-4:] = self.generation.to_bytes(4, "little")
        files[SHARD2] = bytes(shard)
        return files

    def fetch(self, **changes: Any) -> Outcome:
        return run(self.asked, replace(self.settings, **changes), self.variables)

    def publish_good(self) -> Path:
        """In this process, which has imported everything already."""
        files = self.good()
        self.set_content(files)
        model = resolve(self.asked, self.settings, self.variables, lambda progress: None)
        assert {path.name: path.read_bytes() for path in model.directory.iterdir() if path.name in files} == files
        assert self.link.resolve() == model.directory
        return model.directory

    def check_served(self, directory: Path, before: Mapping[str, str]) -> None:
        """The link leads to this version, to the byte; nothing beside the store changed; a start that asks the store first gets it."""
        assert self.link.resolve() == directory
        assert publishing.wrong(self.store, self.asked) == []
        assert digests(self.around, self.store) == before
        local = replace(self.asked, sources=("local",))
        assert resolve(local, self.settings, self.variables, lambda progress: None).directory == directory


def digests(directory: Path, without: Path) -> dict[str, str]:
    """Every file below, but for one directory: its bytes."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_relative_to(without):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else oct(path.lstat().st_mode)
    return found


def check_refusal(outcome: Outcome, status: int, *parts: str) -> None:
    """One clear line that names the place, the right status, nothing on stderr, no secret."""
    error = outcome.failed.error
    assert (outcome.status, int(error.status)) == (status, status), error.what
    assert outcome.stderr == b""
    assert error.what.isprintable(), error.what
    assert error.hint.isprintable()
    assert error.hint
    assert len(error.what) < 2000
    assert all(part in error.what for part in parts), error.what
    assert all(event.text.isprintable() for event in outcome.events if isinstance(event, Progress))
    assert "Traceback" not in outcome.raw
    assert "verysecret" not in outcome.raw


@contextmanager
def world(source: str, set_content: Callable[[Mapping[str, bytes]], None], **settings: Any) -> Iterator[World]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        around = Path(directory)
        (around / "store").mkdir()
        (around / "home").mkdir()
        (around / "canary").mkdir()
        (around / "canary/config.json").write_text("theirs")
        (around / "config.json").write_text("theirs")
        made = World(around, Model(**{"source_timeout_s": 0, "fetch_stall_s": 0.3, **settings}), source, set_content)
        made.variables = environ(around / "home")
        yield made


class Bucket:
    """What S3Server serves: `files` with ETags by their bytes. `script` may answer in the bucket's place; `extra` are further
    items of the listing."""

    def __init__(self) -> None:
        self.files: Files = {}
        self.extra: list[str] = []
        self.script: Callable[[s3_server.Asked], s3_server.Reply | None] = lambda asked: None
        self.sent_bytes: dict[str, int] = {}

    def set(self, files: Mapping[str, bytes]) -> None:
        self.files, self.extra, self.script = dict(files), [], lambda asked: None

    def __call__(self, asked: s3_server.Asked) -> s3_server.Reply:
        reply = self.script(asked)
        if reply is not None:
            return reply
        if "list-type=2" in asked.target:
            return s3_server.listing(*(s3_server.item(f"p/Tiny/{name}", len(data), etag(data)) for name, data in self.files.items()), *self.extra)
        name = asked.path.removeprefix("/models/p/Tiny/")
        return self.piece(asked, name, self.files[name])

    def piece(self, asked: s3_server.Asked, name: str, data: bytes) -> s3_server.Reply:
        if asked.headers.get("if-match", etag(data)) != etag(data):
            return s3_server.error(412, "PreconditionFailed")
        first, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
        body = data[int(first) : int(last) + 1]
        self.sent_bytes[name] = self.sent_bytes.get(name, 0) + len(body)
        return s3_server.Reply(206, body, {"ETag": etag(data), "Content-Range": f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}"})


def etag(data: bytes) -> str:
    return f'"{hashlib.sha1(data).hexdigest()}-2"'


@contextmanager
def hub_world(**settings: Any) -> Iterator[tuple[World, FakeHub]]:
    with FakeHub({ID: BASE}) as hub:

        def set_content(files: Mapping[str, bytes]) -> None:
            hub.script = lambda asked: None
            hub.push(ID, files)

        with world("hf-hub", set_content, hf_endpoint=hub.url, **settings) as made:
            yield made, hub


@contextmanager
def s3_world(**settings: Any) -> Iterator[tuple[World, Bucket, S3Server]]:
    bucket = Bucket()
    with S3Server(bucket) as server, world("r2", bucket.set, r2_bucket="models", r2_models_prefix="p", r2_endpoint_url=server.url, **settings) as made:
        yield made, bucket, server


def _base() -> Files:
    with tempfile.TemporaryDirectory() as directory:
        made = demo.make(Path(directory))
        return {path.name: path.read_bytes() for path in sorted(made.iterdir())}


BASE = _base()


def reheadered(shard: bytes, header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + shard[8 + int.from_bytes(shard[:8], "little") :]


def header_of(shard: bytes) -> dict[str, Any]:
    return dict(json.loads(shard[8 : 8 + int.from_bytes(shard[:8], "little")]))
