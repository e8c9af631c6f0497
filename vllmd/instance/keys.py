"""The keys of an instance on the disk: keys.json, for vllmd alone, and public/NAME/credentials.json, for dependents.

Both the supervisor and vllmctl write them, the latter mostly as root in what belongs to the service's account: by
system/folder, under a lock. keys.json is written first; what a power cut leaves of the other is repaired at the next look.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from vllmd.config.paths import Paths
from vllmd.core import keyring
from vllmd.core.keyring import DEFAULT, Key, Ring
from vllmd.errors import ConfigError
from vllmd.system.files import storage_error
from vllmd.system.folder import Folder

FILE = "keys.json"
CREDENTIALS = "credentials.json"
FILE_MODE = 0o600
CREDENTIALS_MODE = 0o640
"""Its group is that of its directory: `chgrp clients` and `chmod g+s` on public/NAME give it to another one."""


@dataclass(frozen=True, slots=True)
class Held:
    """The keys as they stand in the file; `mark` tells one content from another, and nothing of it."""

    ring: Ring
    mark: str = ""
    is_new: bool = False


def new_key(name: str) -> Key:
    value = "".join(secrets.choice(keyring.ALPHABET) for _ in range(keyring.LENGTH))
    return Key(name, value, datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"))


def read(paths: Paths, instance: str) -> Held:
    """What holds now; an empty ring where there is no file. ConfigError, PermissionMissing, StorageFailed."""
    try:
        with Folder.open(paths.state, "instances", instance) as folder:
            return _read(folder)
    except FileNotFoundError:
        return Held(Ring())
    except OSError as error:
        raise storage_error(error, f"read {error.filename or FILE}") from error


def ensure(paths: Paths, instance: str, *, wanted: bool) -> Held:
    """As `read`; where there is no default key, it is made if one is `wanted`. credentials.json says what it must."""

    def complete(ring: Ring) -> Ring:
        return ring if ring.get(DEFAULT) or not wanted else Ring((new_key(DEFAULT), *ring.keys))

    return change(paths, instance, complete)


def change(paths: Paths, instance: str, decide: Callable[[Ring], Ring]) -> Held:
    """The ring that `decide` makes of the present one, written. What it raises goes through, and then nothing has changed."""
    try:
        with Folder.open(paths.state, "instances", instance, make=True) as folder, folder.locked():
            before = _read(folder)
            now = keyring.without_ended(before.ring, time.time())
            after = decide(now)
            if after == before.ring and folder.mode_of(FILE) in (-1, FILE_MODE):
                held = before
            else:
                content = keyring.document(after)
                folder.write(FILE, content, FILE_MODE)
                held = Held(after, _mark(content.encode()), is_new=before.ring.get(DEFAULT) is None is not after.get(DEFAULT))
            _publish(paths, instance, after.get(DEFAULT))
            return held
    except OSError as error:
        raise storage_error(error, f"write the keys of {instance}: {error.filename or ''}".rstrip(": ")) from error


def _read(folder: Folder) -> Held:
    content = folder.read(FILE, keyring.FILE_MAX_BYTES)
    if content is None:
        return Held(Ring())
    try:
        return Held(keyring.parse(content), _mark(content))
    except ValueError as error:
        path = folder.path / FILE
        raise ConfigError("keys_invalid", f"{path}: {error}", f"correct it, or remove it: a new key is made at the next start (rm {path})") from None


def _mark(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _publish(paths: Paths, instance: str, key: Key | None) -> None:
    """credentials.json of the instance, and the plain one where no other instance has it."""
    if key is None:
        return
    content = keyring.credentials(key.value)
    with Folder.open(paths.state, "public", instance, make=True) as own:
        is_there = False
        with suppress(OSError):  # a link or a directory in its place is replaced, or said by the write
            is_there = own.read(CREDENTIALS, 4096) == content.encode() and own.mode_of(CREDENTIALS) == CREDENTIALS_MODE
        if not is_there:
            own.write(CREDENTIALS, content, CREDENTIALS_MODE)
    with Folder.open(paths.state, "public", make=True) as public:
        public.link(CREDENTIALS, f"{instance}/{CREDENTIALS}")


def guard_document(keys: tuple[Key, ...], open_paths: tuple[str, ...]) -> str:
    """What engines/guard reads: sums, so that a dump of the engine's memory or a copy of the file holds no key."""
    sums = [{"sha256": hashlib.sha256(key.value.encode()).hexdigest(), "until": key.until} for key in keys]
    return json.dumps({"schema": 1, "open_paths": list(open_paths), "keys": sums}) + "\n"
