"""`vllmctl store export|import`: a model as one tar file, through a file or a pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from vllmd.ctl.progress import Shown, progress
from vllmd.ctl.store import Place
from vllmd.ctl.store_chosen import LIST, changing, look, named, only, permitted, shown
from vllmd.errors import ModelInvalid, StorageFailed, UsageError
from vllmd.models import amounts, archive, published
from vllmd.models.catalog import HUB_KIND, LOCAL_KIND, PUBLISHED_KIND, Catalog, Item
from vllmd.models.contents import Contents, Entry
from vllmd.models.hashing import hash_files
from vllmd.models.identity import hash12
from vllmd.models.ioerrors import explained
from vllmd.models.listing import checked
from vllmd.models.lock import locked
from vllmd.models.remote import Listing, RemoteFile
from vllmd.models.store import hold
from vllmd.models.validate import checks_of, validate
from vllmd.system.files import storage_error

STDIO = "-"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is exported: `directory` is a real one."""

    item: Item
    directory: Path


def export(place: Place, name: str, version: str | None, output: str, identity: str | None) -> int:
    """Everything that is said goes to stderr. ModelInvalid where the model is not whole."""
    if output == STDIO and sys.stdout.isatty():
        raise UsageError("usage", "a terminal cannot take a tar file", "-o FILE, or a pipe")
    if output != STDIO and Path(output).is_dir():
        raise UsageError("usage", f"-o {shown(output)} is a directory", "-o FILE says the file's name too")
    if identity is not None:
        _check_identity(identity)
    chosen = _chosen(look(place), name, version)
    with permitted(place, "read"), hold(chosen.directory):
        contents = _contents(chosen, place)
        contents = replace(contents, identity=identity) if identity is not None else contents
        _check_identity(contents.identity)
        with _sink(output) as sink, _shown(contents.identity, "export", contents.bytes) as report:
            archive.write(contents, chosen.directory, sink, report)
    _say(f"Exported {contents.identity}, version {contents.sha256[:12]}: {amounts.files(len(contents.files))}, {amounts.size(contents.bytes)}")
    return 0


def _check_identity(identity: str) -> None:
    try:
        archive.identified(identity, Path("/"))
    except ValueError as error:
        raise UsageError("bad_identity", f"{shown(identity)} cannot be a model's id: {error}", "--as ORG/NAME says what it is") from None


def _chosen(found: Catalog, name: str, version: str | None) -> Chosen:
    items = named(found, name, version)
    for kind in (PUBLISHED_KIND, HUB_KIND, LOCAL_KIND):
        if of_kind := [item for item in items if item.kind == kind]:
            item = only(of_kind, name)
            directory = item.directory / "snapshots" / item.revision if kind == HUB_KIND else item.directory
            if kind == HUB_KIND and not item.snapshots:
                break
            return Chosen(item, Path(os.path.realpath(directory)))
    raise UsageError("not_complete", f"{shown(name)} is an unfinished download", LIST)


def _contents(chosen: Chosen, place: Place) -> Contents:
    """The manifest that there is, or one made now."""
    if chosen.item.kind != PUBLISHED_KIND:
        return _computed(chosen, place)
    contents = published.manifest_of(chosen.directory)
    reason = published.fault(chosen.directory, contents) if contents is not None else "has no manifest that can be read"
    if contents is None or reason:
        raise ModelInvalid("model_corrupt", f"{chosen.directory}: {reason}", f"vllmctl store verify {shown(chosen.item.identity)}")
    return contents


def _computed(chosen: Chosen, place: Place) -> Contents:
    """Of a hub cache's snapshot or a user's own directory, after the checks that a start makes. Twice the same for the same files."""
    item = chosen.item
    inventory = validate(chosen.directory, checks_of(place.settings))
    listing = Listing(tuple(RemoteFile(name, file.size) for name, file in inventory.files.items()), str(chosen.directory))
    checked(listing)
    with _shown(item.identity, "hash", inventory.bytes) as report:
        both = frozenset({"sha256", "blake3"})
        digests = hash_files(chosen.directory, dict.fromkeys(inventory.files.values(), both), lambda done, _total: report(done))
    newest = max(file.mtime_ns for file in inventory.files.values()) / 1e9
    at = datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    files = {name: Entry(file.size, digests[name].sha256, digests[name].blake3) for name, file in inventory.files.items()}
    source, origin = ("hf-cache", f"hub cache of {item.id}") if item.kind == HUB_KIND else ("local", f"directory {item.name}")
    return Contents(item.identity, source, origin, item.revision, at, files)


class _Unwritten(Exception):
    """Tells a failure to write the archive from one to read the model."""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Unwritten from error


def _write_all(fd: int, data: bytes) -> None:
    with _writing():
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]


@contextmanager
def _sink(output: str) -> Iterator[Callable[[bytes], object]]:
    """Where the archive goes. A file gets its name when all of it is on the disk. StorageFailed, PermissionMissing."""
    try:
        with _opened(output) as fd:
            yield lambda piece: _write_all(fd, piece)
    except _Unwritten as wrapped:
        error = wrapped.__cause__
        where = "standard output" if output == STDIO else shown(output)
        if isinstance(error, BrokenPipeError):
            raise StorageFailed("reader_gone", f"{where}: who read it went away before the end", "Look what the reading command said.") from None
        raise storage_error(error if isinstance(error, OSError) else OSError(), f"write {where}") from error


@contextmanager
def _opened(output: str) -> Iterator[int]:
    if output == STDIO:
        yield sys.stdout.fileno()
        return
    path = Path(output)
    is_plain = archive.is_plain_target(path)
    place = path.with_name(f".{path.name[:100]}.{os.urandom(6).hex()}.part") if is_plain else path
    with _writing():
        stream = place.open("xb" if is_plain else "wb", buffering=0)
    try:
        with stream:
            yield stream.fileno()
            if is_plain:
                with _writing():
                    os.fsync(stream.fileno())
                    place.replace(path)
    except BaseException:
        if is_plain:
            with contextlib.suppress(OSError):
                place.unlink()
        raise


def take(place: Place, source: str, version: str | None) -> int:
    """Imports; what is there already stays as it is. ModelInvalid where the archive is not what it says."""
    with _terminable(), _stream(source) as stream, changing(place, "import into"):
        origin = "standard input" if source == STDIO else source
        incoming = archive.open_archive(stream.read, origin, place.store)
        identity, sha256 = incoming.contents.identity, incoming.contents.sha256
        if version is not None and not sha256.startswith(version):
            raise ModelInvalid("version_differs", f"{origin} holds {identity}, version {sha256[:12]}, and not {shown(version)[:64]}", "Ask who made it.")
        with locked(place.store, hash12(incoming.request.identity), place.settings.lock_timeout_s, _say) as lock:
            if archive.is_here(incoming):
                _say(f"{identity}, version {sha256[:12]}, is in the store already")
                _drain(stream)
                return 0
            with _shown(identity, "import", incoming.contents.bytes) as report:

                def told(done: int) -> None:
                    report(done)
                    lock.say(f"{amounts.size(done)} of {amounts.size(incoming.contents.bytes)} imported")

                directory = archive.publish_archive(incoming, place.settings, told, _say)
        _drain(stream)
    sys.stdout.write(f"Imported {identity}, version {sha256[:12]}: {amounts.size(incoming.contents.bytes)} in {directory}\n")
    return 0


@contextmanager
def _stream(source: str) -> Iterator[BinaryIO]:
    if source == STDIO:
        if sys.stdin.isatty():
            raise UsageError("usage", "a terminal is no tar file", "give a file, or a pipe")
        with open(0, "rb", closefd=False, buffering=archive.CHUNK_BYTES) as stream:
            yield stream
        return
    try:
        stream = open(source, "rb", buffering=archive.CHUNK_BYTES)  # noqa: SIM115 - its errors alone are those of the command line
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UsageError("no_archive", f"{shown(source)}: {error.strerror}", "give the file that `vllmctl store export` wrote") from None
    except OSError as error:
        raise storage_error(error, f"read {shown(source)}") from error
    with stream:
        yield stream


def _drain(stream: BinaryIO) -> None:
    """Who writes into the pipe must not fail because we know the rest."""
    with explained("read standard input"):
        while stream.fileno() == 0 and stream.read(archive.CHUNK_BYTES):
            pass


@contextmanager
def _terminable() -> Iterator[None]:
    """A closed terminal or a SIGTERM ends it like Ctrl-C, so that no stage is left."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _shown(identity: str, phase: str, total: int) -> Iterator[Callable[[int], None]]:
    with progress(shown(identity)) as show:
        yield lambda done: show(Shown(phase, done / total if total else None, f"{amounts.size(done)} of {amounts.size(total)}"))


def _say(line: str) -> None:
    sys.stderr.write(f"{shown(line)}\n")
    sys.stderr.flush()
