"""What a model's own files say of its size, without its weights: config.json, and the headers of its safetensors files.

A directory of this host, or what a source on a network offers (`remote`), through the same door. What is read is hostile: bounded, and
believed no further than the sizes of the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vllmd.core.weights import Tensor
from vllmd.models import safetensors, weights
from vllmd.models.inventory import invalid, open_file
from vllmd.models.ioerrors import explained
from vllmd.models.remote import RemoteFile
from vllmd.models.sources import Offered

MAX_CONFIG_BYTES, MAX_INDEX_BYTES = 16 << 20, 64 << 20
MAX_HEADERS_BYTES = 64 << 20
"""Of all files; the largest models today have 20 MB."""
_INDEX = "model.safetensors.index.json"


class Facts(NamedTuple):
    """`tensors` is empty where only the sizes of the files were read. `file_bytes`: of the weights; `read_bytes`: what was read of all
    that; `origin` for people."""

    origin: str
    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    file_bytes: int
    read_bytes: int
    revision: str = ""
    notes: tuple[str, ...] = ()


class Files(Protocol):
    """The files at a model's root, and pieces of them."""

    origin: str
    revision: str
    sizes: Mapping[str, int]
    first_bytes: int
    """How much of a file is asked for before its header's length is known."""

    def read(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """(name, begin, end) each, within the file's size."""

    @property
    def read_bytes(self) -> int: ...


def of(files: Files, most_header_bytes: int = MAX_HEADERS_BYTES) -> Facts:
    """ModelInvalid where that is no model; errors of the disk or the network as theirs. Where the headers are longer than
    `most_header_bytes`, tensors are left out."""
    config = _config(files)
    names, notes = _chosen(files)
    size = sum(files.sizes[name] for name in names)
    headers = _headers(files, [name for name in names if name.endswith(".safetensors")], most_header_bytes)
    if headers is None:
        notes.append("its headers are long: weights are reckoned from the sizes of its files")
    tensors = tuple(tensor for name, text in (headers or {}).items() for tensor in _tensors(files, name, text))
    return Facts(files.origin, config, tensors, size, files.read_bytes, files.revision, tuple(notes))


def local(directory: Path, most_header_bytes: int = MAX_HEADERS_BYTES) -> Facts:
    with explained(f"read {directory}"):
        return of(_Local(directory), most_header_bytes)


def remote(offered: Offered, environ: Mapping[str, str]) -> Facts:
    """Asks for pieces of files only."""
    from vllmd.models.transfer.pieces import Pieces

    with Pieces(offered.transport, offered.listing.origin, environ) as pieces:
        return of(_Remote(offered, pieces))


class _Local:
    """A directory. Links are followed: a hub cache is made of them."""

    first_bytes = 4096

    def __init__(self, directory: Path) -> None:
        self.origin, self.revision = str(directory), ""
        self._directory = directory
        self.read_bytes = 0
        found: dict[str, int] = {}
        with os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        found[entry.name] = status.st_size
        self.sizes: Mapping[str, int] = found

    def read(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        return [self._one(*each) for each in wanted]

    def _one(self, name: str, begin: int, end: int) -> bytes:
        fd = open_file(self._directory, name)
        try:
            data = os.pread(fd, end - begin, begin)
        finally:
            os.close(fd)
        self.read_bytes += len(data)
        return data


class _Remote:
    """What a source offers. Most headers come with the first answer: a second would take as long again."""

    first_bytes = 64 << 10

    def __init__(self, offered: Offered, pieces: Any) -> None:
        self.origin, self.revision = offered.listing.origin, offered.listing.revision
        self._files: dict[str, RemoteFile] = {file.name: file for file in offered.listing.files if "/" not in file.name}
        self.sizes: Mapping[str, int] = {name: file.size for name, file in self._files.items()}
        self._pieces = pieces

    def read(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        from vllmd.models.transfer.pieces import Piece

        found: list[bytes] = self._pieces.get([Piece(self._files[name], begin, end) for name, begin, end in wanted])
        return found

    @property
    def read_bytes(self) -> int:
        return int(self._pieces.read_bytes)


def _config(files: Files) -> Mapping[str, Any]:
    if "config.json" not in files.sizes:
        raise invalid(files.origin, "has no config.json: nothing says how its KV cache is laid out", "Give a model of the Hugging Face layout.", "model_incomplete")
    return _object(files, "config.json", MAX_CONFIG_BYTES)


def _object(files: Files, name: str, limit: int) -> Mapping[str, Any]:
    size = files.sizes[name]
    if size > limit:
        raise invalid(f"{files.origin}/{name}", f"is larger than {limit} bytes, which no such file is")
    try:
        found = json.loads(files.read([(name, 0, size)])[0].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise invalid(f"{files.origin}/{name}", f"is no JSON ({str(error)[:200]})", code="model_corrupt") from None
    if not isinstance(found, dict):
        raise invalid(f"{files.origin}/{name}", "is no JSON object", code="model_corrupt")
    return found


def _chosen(files: Files) -> tuple[list[str], list[str]]:
    """The files that an engine loads, and what is to be said of the choice."""
    found = sorted(weights.loaded(files.sizes))
    tensors = [name for name in found if name.endswith(".safetensors")]
    if tensors:
        return _indexed(files, tensors), []
    if ggufs := [name for name in found if name.endswith(".gguf")]:
        return _one_gguf(files, ggufs)
    if not found:
        raise invalid(files.origin, "has no weights", "Give a model with *.safetensors or *.gguf files.", "model_incomplete")
    return found, ["its weights are pickle files, which have no header: they are reckoned from the sizes of the files"]


def _indexed(files: Files, names: list[str]) -> list[str]:
    """Where a repository has the same weights twice (model-*, consolidated-*), its index says which are meant."""
    stems = {match[1] if (match := weights.PART.fullmatch(name)) else name for name in names}
    if len(stems) == 1 or _INDEX not in files.sizes:
        return [name for name in names if not name.startswith("consolidated")] or names
    listed = _object(files, _INDEX, MAX_INDEX_BYTES).get("weight_map")
    meant = {each for each in listed.values() if isinstance(each, str)} if isinstance(listed, dict) else set()
    return [name for name in names if name in meant] or names


def _one_gguf(files: Files, names: list[str]) -> tuple[list[str], list[str]]:
    """Repositories of GGUF files have the model in many sizes: the largest is the safe guess."""
    sets: dict[str, list[str]] = {}
    for name in names:
        match = weights.PART.fullmatch(name)
        sets.setdefault(match[1] if match else name, []).append(name)
    largest = max(sets.values(), key=lambda each: sum(files.sizes[name] for name in each))
    notes = [f"it has {len(sets)} GGUF variants: the largest, {largest[0][:100]}, is reckoned with"] if len(sets) > 1 else []
    return largest, notes


def _headers(files: Files, names: list[str], most: int) -> dict[str, bytes] | None:
    """Of each file; None where they are longer than `most` together."""
    first = files.read([(name, 0, min(files.first_bytes, files.sizes[name])) for name in names])
    lengths = {name: _length(files, name, data) for name, data in zip(names, first, strict=True)}
    if sum(lengths.values()) > min(most, MAX_HEADERS_BYTES):
        return None
    longer = [name for name, data in zip(names, first, strict=True) if 8 + lengths[name] > len(data)]
    begun = dict(zip(names, first, strict=True))
    rest = dict(zip(longer, files.read([(name, len(begun[name]), 8 + lengths[name]) for name in longer]), strict=True))
    return {name: (begun[name] + rest.get(name, b""))[8 : 8 + lengths[name]] for name in names}


def _length(files: Files, name: str, data: bytes) -> int:
    size, length = files.sizes[name], int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < length <= min(size - 8, safetensors.MAX_HEADER_BYTES):
        reason = f"truncated or not safetensors: its header claims {length} bytes, in a file of {size}"
        raise invalid(f"{files.origin}/{name}", reason, code="model_truncated")
    return length


def _tensors(files: Files, name: str, text: bytes) -> Iterator[Tensor]:
    for tensor, dtype, shape, size in safetensors.listed(Path(f"{files.origin}/{name}"), text):
        yield Tensor(tensor, dtype, shape, size)
