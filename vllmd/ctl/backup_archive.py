"""A backup's file: one tar of small files, whose first is a list of all others with their sums.

It is read whole and checked before anything of it is used: it may come from anywhere, and is written back by root.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.config.values import printable
from vllmd.errors import ModelInvalid, UsageError
from vllmd.models import tarstream
from vllmd.models.tarstream import Reader, TarDamaged
from vllmd.system.files import storage_error

LIST = "vllmd-backup.json"
SCHEMA = 1
FILE_BYTES, LIST_BYTES, ALL_BYTES, FILES = 4 << 20, 16 << 20, 256 << 20, 20_000
_PART = r"(?!\.\.?(?:/|$))[A-Za-z0-9._@+-]{1,200}"
_NAME = re.compile(rf"etc(?:/{_PART}){{1,5}}|default/vllmd|credstore(?:\.encrypted)?/vllmd\.[A-Za-z0-9._@+-]{{1,200}}|instances/[a-z0-9][a-z0-9._-]{{0,47}}/(?:keys\.json|generations/[0-9]{{1,9}}\.json)")
_HINT = "It is no backup of vllmd, or was damaged: take another one (`vllmctl backup list`)."


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: its permission bits and bytes. Whose it is follows from where it goes; of a configuration it is also said by name,
    where that is not root: one with a secret in it is often for the service's group alone."""

    mode: int
    content: bytes
    owner: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Backup:
    """`entries` by name: etc/..., default/vllmd, credstore/..., instances/NAME/... . `created_at` RFC 3339. `models`: files beside it."""

    created_at: str
    version: str
    has_secrets: bool
    entries: Mapping[str, Entry]
    models: tuple[str, ...] = ()

    @property
    def instances(self) -> tuple[str, ...]:
        top = (name.split("/") for name in self.entries)
        return tuple(sorted(parts[1].removesuffix(".yaml") for parts in top if parts[0] == "etc" and len(parts) == 2 and parts[1].endswith(".yaml") and parts[1] != "vllmd.yaml"))


def is_name(name: str) -> bool:
    """Whether a file of that name can be in a backup."""
    return bool(_NAME.fullmatch(name))


def write(path: Path, backup: Backup) -> None:
    """A new file of mode 0600, which `read` takes. StorageFailed; UsageError where it exists, or where it would be too large."""
    listed = [_line(name, each) for name, each in backup.entries.items()]
    words = {"schema": SCHEMA, "created_at": backup.created_at, "version": backup.version, "secrets": backup.has_secrets, "models": list(backup.models), "files": listed}
    head = (json.dumps(words, indent=1) + "\n").encode()
    if len(listed) > FILES or len(head) > LIST_BYTES or sum(len(each.content) for each in backup.entries.values()) > ALL_BYTES:
        raise UsageError("backup_too_large", f"{len(listed)} files are more than a backup takes", f"{FILES} files of {ALL_BYTES >> 20} MiB together; what lies there that is no configuration?")
    temporary = path.with_name(f".{path.name[:100]}.{os.urandom(6).hex()}.part")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as stream:
            for name, content in ((LIST, head), *((name, each.content) for name, each in backup.entries.items())):
                stream.write(tarstream.header(name, len(content)) + content + tarstream.padding(len(content)))
            stream.write(tarstream.END)
            stream.flush()
            os.fsync(stream.fileno())
        _publish(temporary, path)
    except FileExistsError:
        raise UsageError("backup_exists", f"{path} exists already", "give another name") from None
    except OSError as error:
        raise storage_error(error, f"write {path}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _line(name: str, each: Entry) -> dict[str, Any]:
    whose = {key: value for key, value in (("owner", each.owner), ("group", each.group)) if value}
    return {"name": name, "size": len(each.content), "mode": each.mode, "sha256": hashlib.sha256(each.content).hexdigest(), **whose}


def _publish(temporary: Path, path: Path) -> None:
    """Under its name, never over another file. OSError."""
    try:
        os.link(temporary, path)
    except (PermissionError, NotImplementedError) as error:  # a USB disk or a share, whose file system has no hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> Backup:
    """Whole and checked. ModelInvalid-like status 65 where anything is not as listed; UsageError where there is no such file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UsageError("no_backup", f"{path} is no file", "give the file that `vllmctl backup create` wrote")
            return _parse(path, Reader(stream.read))
    except FileNotFoundError:
        raise UsageError("no_backup", f"there is no {path}", "`vllmctl backup list` shows what is") from None
    except OSError as error:
        raise storage_error(error, f"read {path}") from error
    except TarDamaged as error:
        raise _damaged(path, str(error)) from None


def _parse(path: Path, reader: Reader) -> Backup:
    head = _head(path, reader)
    listed = head.get("files")
    if not isinstance(listed, list) or len(listed) > FILES:
        raise _damaged(path, "lists no files")
    entries: dict[str, Entry] = {}
    total = 0
    for each in listed:
        name, mode, wanted = (each.get("name"), each.get("mode"), each.get("sha256")) if isinstance(each, dict) else (None, None, None)
        if not isinstance(name, str) or not is_name(name) or name in entries or type(mode) is not int:
            raise _damaged(path, f"lists {printable(str(name))[:200]!r}, which is no file of a backup")
        member = reader.next()
        if member is None or member.name != name:
            raise _damaged(path, f"does not hold {name}, which it lists")
        content = _taken(path, reader, member.size, name)
        total += len(content)
        if hashlib.sha256(content).hexdigest() != wanted:
            raise _damaged(path, f"{name} is not what was written")
        if total > ALL_BYTES:
            raise _damaged(path, "is larger than any backup")
        entries[name] = Entry(mode & 0o755 & ~0o111, content, _text(each, "owner"), _text(each, "group"))
    if reader.next() is not None:
        raise _damaged(path, "holds more than it lists")
    models = head.get("models")
    names = tuple(each for each in models if isinstance(each, str) and re.fullmatch(_PART, each)) if isinstance(models, list) else ()
    return Backup(_text(head, "created_at"), _text(head, "version"), head.get("secrets") is True, entries, names)


def _head(path: Path, reader: Reader) -> dict[str, Any]:
    member = reader.next()
    if member is None or member.name != LIST:
        raise _damaged(path, f"does not begin with {LIST}")
    try:
        head = json.loads(_taken(path, reader, member.size, LIST, LIST_BYTES))
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict) or head.get("schema") != SCHEMA:
        raise _damaged(path, f"is of another format than {SCHEMA}, the one that is known here")
    return head


def _taken(path: Path, reader: Reader, size: int, name: str, limit_bytes: int = FILE_BYTES) -> bytes:
    if size > limit_bytes:
        raise _damaged(path, f"{name} is larger than {limit_bytes >> 20} MiB")
    content = b""
    while len(content) < size:
        content += reader.take(size - len(content))
    return content


def _text(words: Mapping[str, Any], key: str) -> str:
    value = words.get(key)
    return printable(value)[:100].replace("\n", " ") if isinstance(value, str) else ""


def _damaged(path: Path, reason: str) -> ModelInvalid:
    return ModelInvalid("backup_damaged", f"{path}: {reason}", _HINT)
