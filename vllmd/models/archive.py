"""A model as one tar file, for machines without a network: <label>/.vllmd-manifest.json first, then its files in order of name.

The manifest comes first so that who imports knows at once what will come, whether there is room, and what every byte must be.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllmd.config import parsers
from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.errors import ModelInvalid
from vllmd.models import contents as manifests
from vllmd.models import publish, space
from vllmd.models.catalog import IMPORTED
from vllmd.models.contents import Contents
from vllmd.models.hashing import Digest
from vllmd.models.identity import label
from vllmd.models.inventory import OWN_FILES, invalid, open_file
from vllmd.models.leftovers import STAGING
from vllmd.models.listing import checked
from vllmd.models.lock import private_directory
from vllmd.models.remote import Listing, RemoteFile
from vllmd.models.tarstream import END, Reader, TarDamaged, TarEnds, header, padding
from vllmd.models.validate import checks_of, validate

CHUNK_BYTES = 1 << 20
SOURCE = "import"
_AHEAD = 8
_HINT = "Copy the archive again, or export the model anew where it came from."
Report = Callable[[int], None]


def identified(identity: str, store: Path) -> ModelRequest:
    """What ID or ID@REVISION asks for. ValueError."""
    model_id, at, revision = identity.partition("@")
    found, chosen = parsers.model_id(model_id), parsers.revision(revision)
    if not found or (at and not chosen):
        raise ValueError(f"must be ORG/NAME or ORG/NAME@REVISION, not {identity[:200]!r}")
    return ModelRequest(found.rpartition("/")[2], found, chosen, "", (), store)


# Export.


def write(contents: Contents, directory: Path, sink: Callable[[bytes], object], report: Report) -> None:
    """The archive of what lies in `directory`, piece by piece into `sink`; each byte is compared on the way. `report(bytes)`
    gets those of the model so far. ModelInvalid where a file is not what the manifest says; OSError."""
    top = label(identified(contents.identity, directory))
    manifest = (json.dumps({"schema": manifests.SCHEMA, **asdict(contents)}, indent=1) + "\n").encode()
    for piece in (header(f"{top}/{manifests.FILE}", len(manifest)), manifest, padding(len(manifest))):
        sink(piece)
    done = 0
    for name, entry in sorted(contents.files.items()):
        sink(header(f"{top}/{name}", entry.size))
        with _sums(frozenset({"blake3"})) as sums, open(open_file(directory, name), "rb", buffering=0) as file:
            for piece in _pieces(file.fileno(), entry.size):
                sums.add(piece)
                sink(piece)
                done += len(piece)
                report(done)
            size = os.fstat(file.fileno()).st_size
            if size != entry.size or sums.finish().blake3 != entry.blake3:
                raise invalid(directory / name, "is not what its manifest says; the archive is not complete", "vllmctl store verify says more.", "model_corrupt")
        sink(padding(entry.size))
    sink(END)


def _pieces(fd: int, size: int) -> Iterator[bytes]:
    """The first `size` bytes, or what there is of them."""
    while size and (piece := os.read(fd, min(CHUNK_BYTES, size))):
        size -= len(piece)
        yield piece


# Import.


@dataclass(frozen=True, slots=True)
class Incoming:
    """An archive whose manifest was read. `origin` names it for people; `request` is the model that it says to be."""

    reader: Reader
    origin: str
    top: str
    contents: Contents
    request: ModelRequest


def open_archive(read: Callable[[int], bytes], origin: str, store: Path) -> Incoming:
    """Reads the manifest and judges it; nothing is written. ModelInvalid."""
    reader = Reader(read)
    try:
        member = reader.next()
        top, _, name = member.name.partition("/") if member else ("", "", "")
        if member is None or name != manifests.FILE or member.size > manifests.LIMIT_BYTES:
            raise TarDamaged(f"does not begin with {manifests.FILE}: it is no archive of vllmctl store export")
        contents = manifests.parse(b"".join(iter(lambda: reader.take(CHUNK_BYTES), b"")))
        request = identified(contents.identity, store)
    except TarDamaged as error:
        raise _refused(origin, str(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _refused(origin, f"has a damaged manifest: {error}") from None
    _check(contents, origin)
    return Incoming(reader, origin, top, contents, request)


def _refused(origin: str, reason: str) -> ModelInvalid:
    return invalid(origin, reason, _HINT, "archive_invalid")


def _check(contents: Contents, origin: str) -> None:
    """By the rules for what a network offers."""
    checked(Listing(tuple(RemoteFile(name, entry.size) for name, entry in contents.files.items()), origin))
    own = sorted(name for name in contents.files if name in OWN_FILES)
    if own or not contents.files:
        raise _refused(origin, f"names {own[0]}, which is no model's" if own else "names no files")
    texts = (contents.source, contents.origin, contents.revision, contents.created_at)
    if not all(text.isprintable() and len(text) < 1000 for text in texts):
        raise _refused(origin, "has a damaged manifest")


def is_here(incoming: Incoming) -> bool:
    """Whether the very version is what the store has already, whole. OSError."""
    current = publish.current(incoming.request.store, incoming.request)
    return current is not None and current[1].sha256 == incoming.contents.sha256


def publish_archive(incoming: Incoming, settings: Model, report: Report, tell: Callable[[str], None]) -> Path:
    """The published directory, after every byte was compared with the manifest. Needs the identity's lock. What fails leaves
    the store as it was. ModelInvalid, StorageFailed, PermissionMissing; OSError."""
    contents, request = incoming.contents, incoming.request
    with _stage(request) as files:
        space.check(files, contents.bytes, len(contents.files))
        _fill(files, incoming, report)
        validate(files, checks_of(settings))
        # What marks a file for its source is believed of that source alone: else an archive could pass a file of its own off as another model's.
        entries = {name: replace(entry, pin="") for name, entry in contents.files.items()}
        return publish.publish(request.store, request, files, replace(contents, source=SOURCE, files=entries), settings.keep, tell)


@contextmanager
def _stage(request: ModelRequest) -> Iterator[Path]:
    """An empty directory beside the stages of downloads; gone afterwards, whatever happens."""
    name = f"{IMPORTED}{label(request)}"
    directory = private_directory(private_directory(request.store, STAGING), name)
    try:
        for path in list(directory.iterdir()):  # an import that was killed
            shutil.rmtree(path)
        yield private_directory(directory, "files")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _fill(files: Path, incoming: Incoming, report: Report) -> None:
    missing = set(incoming.contents.files)
    done = 0
    name = ""
    try:
        while (member := incoming.reader.next()) is not None:
            name = _name(member.name, incoming)
            entry = incoming.contents.files[name]
            if name not in missing:
                raise TarDamaged(f"holds {name} twice")
            if member.size != entry.size:
                raise TarDamaged(f"holds {name} with {member.size} bytes, and its manifest says {entry.size}")
            digest = _write(files, name, incoming.reader, lambda count, before=done: report(before + count))  # type: ignore[misc]
            if (digest.sha256, digest.blake3) != (entry.sha256, entry.blake3):
                raise TarDamaged(f"holds {name} with other bytes than its manifest says (SHA-256 {digest.sha256} and not {entry.sha256})")
            missing.remove(name)
            done += entry.size
    except TarEnds as error:
        raise _refused(incoming.origin, f"{error}: it ends within {name or 'its manifest'}") from None
    except TarDamaged as error:
        raise _refused(incoming.origin, str(error)) from None
    if missing:
        raise _refused(incoming.origin, f"is truncated: it ends before {min(missing)} ({len(missing)} files are missing)")


def _name(full: str, incoming: Incoming) -> str:
    name = full.removeprefix(f"{incoming.top}/")
    if name == full or name not in incoming.contents.files:
        raise TarDamaged(f"holds {full[:200]!r}, which its manifest does not name")
    return name


def _write(files: Path, name: str, reader: Reader, report: Report) -> Digest:
    """The name was judged before, and the stage is new and ours: nothing there leads anywhere else."""
    directory = files
    for part in name.split("/")[:-1]:
        directory = private_directory(directory, part)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _sums(frozenset({"sha256", "blake3"})) as sums, open(os.open(files / name, flags, 0o644), "wb", buffering=0) as file:
        count = 0
        while piece := reader.take(CHUNK_BYTES):
            sums.add(piece)
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
            count += len(piece)
            report(count)
        return sums.finish()


# Sums, computed beside the reading and writing.


@dataclass(slots=True)
class _Sums:
    hashers: Mapping[str, Any]
    pools: Mapping[str, ThreadPoolExecutor]
    waiting: deque[Future[object]] = field(default_factory=deque)

    def add(self, piece: bytes) -> None:
        """Waits where the hashing is far behind, so that memory stays small."""
        for algorithm, hasher in self.hashers.items():
            self.waiting.append(self.pools[algorithm].submit(hasher.update, piece))
        while len(self.waiting) > _AHEAD * len(self.hashers):
            self.waiting.popleft().result()

    def finish(self) -> Digest:
        while self.waiting:
            self.waiting.popleft().result()
        return Digest(**{algorithm: hasher.hexdigest() for algorithm, hasher in self.hashers.items()})


@contextmanager
def _sums(algorithms: frozenset[str]) -> Iterator[_Sums]:
    """One thread for each algorithm: its pieces are hashed in their order."""
    from blake3 import blake3

    new: Mapping[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "blake3": blake3}
    with ExitStack() as stack:
        pools = {algorithm: stack.enter_context(ThreadPoolExecutor(max_workers=1)) for algorithm in algorithms}
        yield _Sums({algorithm: new[algorithm]() for algorithm in algorithms}, pools)


def is_plain_target(path: Path) -> bool:
    """Whether an export to it may go through a temporary file beside it: a new name, or a plain file."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return True
