"""The API keys of an instance: which there are, what changes them, how they stand in keys.json. Pure: times and new keys are given.

The key named `default` is the one that dependents read in credentials.json. A rotation gives a name a new key, and leaves
the old one valid for a while under another name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LENGTH = 22
"""131 bits."""
DEFAULT = "default"
SCHEMA = 1
KEYS_MAX = 1000
FILE_MAX_BYTES = 1 << 20
LATEST = 253_402_300_799
"""The end of the year 9999, which is as far as a date can be shown."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,47}", re.ASCII)
_VALUE = re.compile(r"[!-~]{8,512}")
"""What a header can carry. Ours have LENGTH characters of ALPHABET; a person may put another one into the file."""


class Refused(ValueError):
    """What was asked of the ring cannot be done; the text is for a person."""


@dataclass(frozen=True, slots=True)
class Key:
    """`until`: when it ends (Unix time), None for never. `repr` shows no secret."""

    name: str
    value: str
    made: str = ""
    until: float | None = None

    def __repr__(self) -> str:
        return f"Key({self.name!r}, until={self.until!r})"


@dataclass(frozen=True, slots=True)
class Ring:
    keys: tuple[Key, ...] = ()

    def get(self, name: str) -> Key | None:
        return next((key for key in self.keys if key.name == name), None)

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(key.value for key in self.keys)


def add(ring: Ring, key: Key) -> Ring:
    check_name(key.name)
    if ring.get(key.name) is not None:
        raise Refused(f"there is a key {key.name} already")
    if len(ring.keys) >= KEYS_MAX:
        raise Refused(f"there are {KEYS_MAX} keys already")
    return Ring((*ring.keys, key))


def rotate(ring: Ring, new: Key, until: float | None) -> Ring:
    """The key of that name is `new` from now on; the old one stays as NAME.old until then, or goes at once where that is None."""
    old = ring.get(new.name)
    if old is None:
        raise Refused(f"there is no key {new.name}")
    rest = Ring(tuple(key for key in ring.keys if key is not old))
    if until is not None:
        ends = until if old.until is None else min(until, old.until)
        rest = add(rest, replace(old, name=_free(rest, f"{new.name[:40]}.old"), until=ends))
    return Ring((new, *rest.keys)) if new.name == DEFAULT else add(rest, new)


def revoke(ring: Ring, name: str) -> Ring:
    if ring.get(name) is None:
        raise Refused(f"there is no key {name}")
    if name == DEFAULT:
        raise Refused(f"the key {DEFAULT} is the one that dependents read: it is replaced, not removed")
    return Ring(tuple(key for key in ring.keys if key.name != name))


def without_ended(ring: Ring, now: float) -> Ring:
    return Ring(tuple(key for key in ring.keys if key.until is None or now < key.until))


def _free(ring: Ring, name: str) -> str:
    taken = {key.name for key in ring.keys}
    return next(each for each in (name, *(f"{name}{number}" for number in range(2, KEYS_MAX + 3))) if each not in taken)


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise Refused("a key's name has lower-case letters, digits, dots, dashes and underscores, at most 48")


def masked(value: str) -> str:
    """Enough to tell two apart, too little to guess the rest."""
    return f"{value[:4]}{'*' * 8}" if len(value) >= LENGTH else "*" * 12


# The file.


def parse(content: bytes) -> Ring:
    """ValueError with a reason that shows no key."""
    try:
        document = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"has not schema {SCHEMA}")
    items = document.get("keys")
    if not isinstance(items, list) or len(items) > KEYS_MAX:
        raise ValueError("keys is no list, or too long")
    keys = tuple(_key(number, item) for number, item in enumerate(items))
    if len({key.name for key in keys}) != len(keys):
        raise ValueError("two keys have one name")
    return Ring(keys)


def _key(number: int, item: Any) -> Key:
    where = f"keys[{number}]"
    if not isinstance(item, Mapping):
        raise ValueError(f"{where} is no mapping")
    name, value, made, until = (item.get(each) for each in ("name", "key", "made", "until"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}.name is no name of a key")
    if not isinstance(value, str) or not _VALUE.fullmatch(value):
        raise ValueError(f"{where}.key has not 8 to 512 printable ASCII characters")
    if until is not None and (isinstance(until, bool) or not isinstance(until, int | float) or not 0 <= until <= LATEST):
        raise ValueError(f"{where}.until is no time")
    return Key(name, value, made if isinstance(made, str) else "", until)


def document(ring: Ring) -> str:
    keys = [{"name": key.name, "key": key.value, "made": key.made, **({} if key.until is None else {"until": key.until})} for key in ring.keys]
    return json.dumps({"schema": SCHEMA, "keys": keys}, indent=1) + "\n"


def credentials(value: str) -> str:
    """What dependents read. Its shape is fixed: {"apiKey": "..."}."""
    return json.dumps({"apiKey": value}) + "\n"
