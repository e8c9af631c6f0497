"""Publishes tiny models, step by step or in a process of its own, and says what is wrong with a store afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from tests import tiny_models
from vllmd.core.model import ModelRequest
from vllmd.models import publish
from vllmd.models.contents import Contents, Entry
from vllmd.models.identity import hash12, label
from vllmd.models.lock import locked, private_directory
from vllmd.models.published import directories, fault, manifest_of
from vllmd.models.remote import Listing, RemoteFile
from vllmd.models.store import published_target

ORIGIN = "s3://bucket/prefix"


def _blake3(data: bytes) -> str:
    try:
        from blake3 import blake3
    except ImportError:  # a guest that only looks at what a power cut left
        return hashlib.sha256(data).hexdigest()

    return str(blake3(data).hexdigest())


def quiet(_text: str) -> None:
    pass


def content(number: int, size: int = 4096) -> Mapping[str, bytes]:
    """The files of version NUMBER: the same names for all, some of the same bytes, some of other ones."""
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "LICENSE": b"free\n" * 10,
        "model.safetensors": _safetensors(bytes([number % 256]) * size),
        "sub/notes.txt": f"version {number}\n".encode(),
    }


def _safetensors(data: bytes) -> bytes:
    header = json.dumps({"weight": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def described(asked: ModelRequest, files: Mapping[str, bytes], created_at: str = "2026-01-01T00:00:00Z") -> Contents:
    entries = {name: Entry(len(data), hashlib.sha256(data).hexdigest(), _blake3(data), pin(data)) for name, data in files.items()}
    return Contents(asked.identity, "r2", ORIGIN, "", created_at, entries)


def pin(data: bytes) -> str:
    return f"etag-{hashlib.sha1(data).hexdigest()}"


def stage(store: Path, asked: ModelRequest, files: Mapping[str, bytes]) -> Path:
    """What a finished download leaves; an earlier attempt's files go."""
    directory = private_directory(private_directory(store, ".staging"), label(asked)) / "files"
    if directory.exists():
        shutil.rmtree(directory)
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def publish_version(
    store: Path,
    number: int,
    *,
    asked: ModelRequest | None = None,
    keep: int = 2,
    created_at: str = "",
    tell: Callable[[str], None] = quiet,
    size: int = 4096,
) -> Path:
    """Version NUMBER of a tiny model, staged and published under its lock; the published directory."""
    asked = asked or tiny_models.request(store)
    with locked(store, hash12(asked.identity), 60, quiet):
        return staged(store, number, asked=asked, keep=keep, created_at=created_at, tell=tell, size=size)()


def staged(
    store: Path, number: int, *, asked: ModelRequest, keep: int = 2, created_at: str = "", tell: Callable[[str], None] = quiet, size: int = 4096
) -> Callable[[], Path]:
    """The publication of what is staged now, still to be called."""
    files = content(number, size)
    at = created_at or f"2026-01-01T{number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}Z"
    directory, contents = stage(store, asked, files), described(asked, files, at)
    share(store, directory, contents)
    return lambda: publish.publish(store, asked, directory, contents, keep, tell)


def share(store: Path, directory: Path, contents: Contents) -> None:
    """What other versions have already, by hard link, as a download does it."""
    listed = Listing(tuple(RemoteFile(name, entry.size, entry.pin) for name, entry in contents.files.items()), contents.origin)
    for name, (path, _) in publish.reusable(store, listed).items():
        other = directory / f"{name}.link"
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            other.hardlink_to(path)
            other.replace(directory / name)


def wrong(store: Path, asked: ModelRequest) -> list[str]:
    """What no kill and no power cut may leave: a link that leads to nothing, or to a version that is not whole to the byte."""
    link = store / label(asked)
    if not os.path.lexists(link):
        return []
    directory = published_target(store, link)
    if directory is None:
        return [f"{link} leads to {os.path.realpath(link)}"]
    contents = manifest_of(directory)
    if contents is None:
        return [f"{directory} has no manifest"]
    return ([reason] if (reason := fault(directory, contents)) else []) + differing(directory, contents)


def differing(directory: Path, contents: Contents) -> list[str]:
    """Files of a version with other bytes than its manifest says."""
    there = [(directory / name, entry.sha256) for name, entry in contents.files.items() if (directory / name).exists()]
    return [f"{path} has other bytes" for path, sha256 in there if hashlib.sha256(path.read_bytes()).hexdigest() != sha256]


def half(store: Path) -> list[str]:
    """What may lie about after a kill, but no longer after the next publication."""
    found = [str(path) for path in (store / ".published").glob("*/.link.*")]
    found += [str(path) for path in (store / ".trash").glob("*")]
    found += [str(path) for path in (store / ".published").glob("*/*.damaged") if not path.with_suffix("").exists()]
    found += [str(path) for path in store.glob("*.bak.*")]
    found += [str(path) for path in store.glob(".staging/*/files")]
    found += [f"{path} is not whole" for path in directories(store) if (contents := manifest_of(path)) is None or fault(path, contents)]
    return found
