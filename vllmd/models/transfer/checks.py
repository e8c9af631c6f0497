"""The sums that a source lists for a file, computed on the way beside SHA-256 and BLAKE3, and compared."""

from __future__ import annotations

import hashlib
import importlib
import zlib
from collections.abc import Callable
from typing import Any

from vllmd.models.hashing import Digest
from vllmd.models.remote import RemoteFile

_LENGTHS = {"sha256": 64, "md5": 32, "git-sha1": 40, "crc32": 8, "crc32c": 8, "crc64nvme": 16}
_CRC_LIBRARIES = {"crc32c": (("awscrt.checksums", "crc32c"), ("google_crc32c", "extend")), "crc64nvme": (("awscrt.checksums", "crc64nvme"),)}
"""Python alone would take minutes for a gigabyte: without these a listed CRC is left out."""


class Sums:
    """Of the bytes of one file from its beginning to some offset."""

    def __init__(self, file: RemoteFile, hashers: dict[str, Any] | None = None) -> None:
        self._file = file
        self._hashers = hashers if hashers is not None else _hashers(file)

    def update(self, data: memoryview) -> None:
        for hasher in self._hashers.values():
            hasher.update(data)

    def copy(self) -> Sums:
        return Sums(self._file, {name: hasher.copy() for name, hasher in self._hashers.items()})

    @property
    def blake3(self) -> str:
        return str(self._hashers["blake3"].hexdigest())

    @property
    def digest(self) -> Digest:
        return Digest(self._hashers["sha256"].hexdigest(), self.blake3)

    def wrong(self) -> str:
        """'' where all that is listed agrees, else 'SUM is X, and Y was listed'."""
        for name, hasher in self._hashers.items():
            listed = self._file.sums.get(name, "").lower()
            if _is_sum(name, listed) and hasher.hexdigest() != listed:
                return f"its {name} is {hasher.hexdigest()}, and {listed} was listed"
        return ""


class _Crc:
    def __init__(self, function: Callable[[Any, int], int], digits: int, value: int = 0) -> None:
        self._function, self._digits, self._value = function, digits, value

    def update(self, data: memoryview) -> None:
        self._value = self._function(data, self._value)

    def copy(self) -> _Crc:
        return _Crc(self._function, self._digits, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:0{self._digits}x}"


def _hashers(file: RemoteFile) -> dict[str, Any]:
    from blake3 import blake3

    made: dict[str, Any] = {"sha256": hashlib.sha256(), "blake3": blake3()}
    if _is_sum("sha256", file.sums.get("sha256", "").lower()):
        return made  # it says all that the others could
    for name in file.sums.keys() & _LENGTHS.keys() - made.keys():
        if _is_sum(name, file.sums[name].lower()) and (hasher := _other(name, file.size)) is not None:
            made[name] = hasher
    return made


def _other(name: str, size: int) -> Any:
    if name == "md5":
        return hashlib.md5(usedforsecurity=False)
    if name == "git-sha1":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if name == "crc32":
        return _Crc(zlib.crc32, 8)
    for module, attribute in _CRC_LIBRARIES[name]:
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
        return _Crc(_turned(function) if module == "google_crc32c" else function, _LENGTHS[name])
    return None


def _turned(extend: Callable[[int, bytes], int]) -> Callable[[Any, int], int]:
    return lambda data, value: extend(value, bytes(data))


def _is_sum(name: str, text: str) -> bool:
    return bool(text) and len(text) == _LENGTHS.get(name) and all(char in "0123456789abcdef" for char in text)
