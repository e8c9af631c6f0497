"""Pure: what of a source's listing is taken. A listing is hostile input, and most repositories hold the same weights twice."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from vllmd.errors import ModelInvalid
from vllmd.models import weights
from vllmd.models.inventory import MAX_DEPTH, MAX_FILES, invalid, is_plain
from vllmd.models.remote import Listing, RemoteFile

MAX_NAME_BYTES = 240
"""Of one part of a name: a file system takes 255, and an unfinished file has a suffix."""
MAX_PATH_BYTES = 1024
_HINT = "Nothing was fetched. Look at the source itself: no model needs such files."
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?")
_OTHER_FRAMEWORKS = re.compile(
    r"(.*/)?(tf_model\.h5|flax_model.*\.msgpack|rust_model\.ot|model\.ckpt.*|[^/]+\.(onnx|onnx_data|mlmodel|tflite|ot|h5|msgpack))|(onnx|coreml|openvino)/.*|original/.*"
)


def checked(listing: Listing) -> Listing:
    """The listing, if every name in it can become a file of its own below one directory; ModelInvalid."""
    if len(listing.files) > MAX_FILES:
        raise invalid(listing.origin, f"lists {len(listing.files)} files; {MAX_FILES} are too many for a model", _HINT, "model_unsafe")
    taken: dict[str, str] = {}
    for file in listing.files:
        reason = _unsafe(file)
        if reason:
            raise invalid(listing.origin, f"lists {file.name[:200]!r}, {reason}", _HINT, "model_unsafe")
        _claim(file.name, taken, listing.origin)
    return listing


def _unsafe(file: RemoteFile) -> str:
    parts = file.name.split("/")
    if not is_plain(file.name) or "" in parts or "." in parts:
        return "which is no name within a model's directory"
    if len(parts) > MAX_DEPTH:
        return "which lies too deep for a model"
    if len(file.name.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return "whose name is too long"
    return "" if 0 <= file.size < 1 << 50 else f"whose size is {file.size}"


def _claim(name: str, taken: dict[str, str], origin: str) -> None:
    """Two names that differ in case only are one file for a case-folding file system; a file's name cannot be a directory's
    too, nor stand there twice. `taken`: folded path -> path, a directory's with '/' at its end."""
    parts = name.split("/")
    for depth in range(1, len(parts)):
        directory = "/".join(parts[:depth]) + "/"
        if taken.setdefault(directory[:-1].casefold(), directory) != directory:
            raise _clash(origin, taken[directory[:-1].casefold()], name)
    if name.casefold() in taken:
        raise _clash(origin, taken[name.casefold()], name)
    taken[name.casefold()] = name


def _clash(origin: str, one: str, other: str) -> ModelInvalid:
    return invalid(origin, f"lists both {one[:200]!r} and {other[:200]!r}, which would be one file", _HINT, "model_unsafe")


def selected(listing: Listing, exclude: Iterable[str]) -> Listing:
    """Without what no engine reads: a tool's dot files, and, beside safetensors, the same weights in other formats. Without
    what a person excludes (shell patterns over the whole name)."""
    patterns = tuple(exclude)
    has_safetensors = any(file.name.endswith(".safetensors") and "/" not in file.name for file in listing.files)
    files = tuple(file for file in listing.files if not _is_idle(file.name, patterns, has_safetensors=has_safetensors))
    return replace(listing, files=files)


def refuse_pickles(listing: Listing) -> None:
    """ModelInvalid where the engine would load pickles from the model's root: nobody waits hours for what is refused then."""
    found = [name for name in weights.loaded(file.name for file in listing.files if "/" not in file.name) if weights.is_pickle(name)]
    if found:
        reason = f"its weights are pickle files ({weights.first_five(found)}), and loading such a file runs any code that its maker put into it"
        hint = "Nothing was fetched. Take a revision or a model with *.safetensors files; if you trust whoever made these, set model.allow_pickle: true (VLLMD_ALLOW_PICKLE=1)."
        raise invalid(listing.origin, reason, hint, "model_pickle")


def _is_idle(name: str, patterns: tuple[str, ...], *, has_safetensors: bool) -> bool:
    if any(part.startswith(".") for part in name.split("/")) or any(fnmatchcase(name, pattern) for pattern in patterns):
        return True
    return has_safetensors and bool(_PICKLES.fullmatch(name) or _OTHER_FRAMEWORKS.fullmatch(name))
