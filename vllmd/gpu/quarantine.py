"""The quarantine: GPUs that need a reset, a reboot or a person, one file each in <state>/gpus/, for all instances of the host.

A new boot lifts reset and reboot; the file stays, so that the third boot in which it happens makes it `replace`, which only
a person lifts (`vllmctl gpu clear`). The directory belongs to the service's user, so its files are read as hostile: by
descriptor, through no symlink, up to a size, and what makes no sense is passed over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vllmd.config.paths import Paths
from vllmd.system import files
from vllmd.system.host import boot_id

UUID = re.compile(r"GPU-[A-Za-z0-9][A-Za-z0-9-]{0,90}", re.ASCII)
BOOTS = 3
"""In as many boots it must have been quarantined (the first, and again after two reboots) to need a person."""
FORGET_S = 90 * 86400
"""What was longer ago than this does not count as the same trouble."""
_LIMIT = 8192
_RECORDS = 1024
_TEXT = 400
_LATEST = 2.5e11
"""In the year 9892. A calendar ends with 9999: a later time in a file ended every start, and `vllmctl gpu`, with a traceback."""
Class = Literal["reset", "reboot", "replace"]
_CLASSES: tuple[Class, ...] = get_args(Class)
_ORDER: Mapping[str, int] = {name: at for at, name in enumerate(_CLASSES)}


@dataclass(frozen=True, slots=True)
class Record:
    """`cls` is `class` in the file. `xid` 0: not by an Xid. `count`: how often, in this boot. `boots`: in how many boots.
    `driver`: what the driver itself asked for (field 230), 0 for nothing. Times are seconds since 1970."""

    uuid: str
    cls: Class
    xid: int = 0
    what: str = ""
    hint: str = ""
    boot_id: str = ""
    count: int = 1
    boots: int = 1
    driver: int = 0
    first_at: float = 0.0
    last_at: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        words = asdict(self)
        return {"schema": 1, "uuid": words.pop("uuid"), "class": words.pop("cls"), **words}


def folder_of(paths: Paths) -> Path:
    return paths.state / "gpus"


def read(paths: Paths, *, boot: str | None = None, also: str = "") -> dict[str, Record]:
    """Which GPUs are quarantined now. Never raises: what cannot be read quarantines nothing.

    `also`: what the host's service takes for the id of this boot. Containers of systemd-nspawn mount a made-up one over the
    kernel's, and ProtectKernelTunables= in a unit takes it away again: vllmctl, outside of a unit, found nothing to clear.
    """
    now = {boot_id() if boot is None else boot, *filter(None, (also,))}
    return {uuid: record for uuid, record in read_all(paths).items() if record.cls == "replace" or record.boot_id in now}


def read_all(paths: Paths) -> dict[str, Record]:
    """Also those that a reboot has lifted."""
    found = {}
    with _opened(paths) as folder:
        if folder < 0:
            return {}
        for name in sorted(os.listdir(folder)):  # noqa: PTH208 - by descriptor
            uuid = name.removesuffix(".json")
            if uuid != name and UUID.fullmatch(uuid) and (record := _load(name, folder)) is not None and record.uuid == uuid:
                found[uuid] = record
                if len(found) == _RECORDS:  # of records, not of names: a thousand files without meaning hid the one that counts
                    break
    return found


def add(paths: Paths, record: Record, *, boot: str | None = None) -> Record:
    """Merged with what is known of that GPU: the graver class stays, the counts go up. ValueError for what is no UUID;
    OSError where it cannot be written, then the old content stays. Blocks on the disk."""
    if not UUID.fullmatch(record.uuid):
        raise ValueError(f"{record.uuid[:100]!r} is no UUID of a GPU")
    merged = merge(read_all(paths).get(record.uuid), replace(record, boot_id=boot_id() if boot is None else boot))
    folder = folder_of(paths)
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link", str(folder))
    files.write_atomic(folder / f"{record.uuid}.json", json.dumps(merged.as_dict()) + "\n")
    return merged


def merge(old: Record | None, new: Record) -> Record:
    """`new` as it is to be written, beside what was known."""
    at = new.last_at or new.first_at or time.time()
    new = replace(new, first_at=new.first_at or at, last_at=at)
    if old is None or at - old.last_at > FORGET_S:
        return new
    if old.boot_id == new.boot_id:
        known = old if is_graver(old, new) else new
        return replace(known, count=old.count + 1, boots=old.boots, driver=new.driver or old.driver, first_at=old.first_at, last_at=at)
    boots = old.boots + 1
    if boots >= BOOTS or old.cls == "replace":
        what = f"{new.what} (again, after {boots - 1} reboots)"
        hint = "It came back after reboots: a person must look at the GPU, its slot and its power. `vllmctl gpu clear UUID` allows it again."
        return replace(new, cls="replace", what=what[:_TEXT], hint=hint, boots=boots)
    return replace(new, boots=boots)


def is_graver(one: Record, other: Record) -> bool:
    return _ORDER[one.cls] > _ORDER[other.cls]


def clear(paths: Paths, uuid: str) -> bool:
    """Allow the GPU again, and forget its history. False when there was nothing. OSError; ValueError for what is no UUID."""
    if not UUID.fullmatch(uuid):
        raise ValueError(f"{uuid[:100]!r} is no UUID of a GPU")
    with _opened(paths) as folder:
        if folder < 0:
            return False
        try:
            os.unlink(f"{uuid}.json", dir_fd=folder)
        except FileNotFoundError:
            return False
        os.fsync(folder)
    return True


@contextlib.contextmanager
def _opened(paths: Paths) -> Iterator[int]:
    """-1 where there is none that can be used."""
    try:
        folder = os.open(folder_of(paths), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield -1
        return
    try:
        yield folder
    finally:
        os.close(folder)


def _load(name: str, folder: int) -> Record | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    try:
        content = os.read(fd, _LIMIT + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    except OSError:
        return None
    finally:
        os.close(fd)
    return parse(content)


def parse(content: bytes) -> Record | None:
    """None for what is no record."""
    if len(content) > _LIMIT:
        return None
    try:
        words = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(words, dict) or words.get("schema") != 1 or words.get("class") not in _CLASSES:
        return None
    uuid, boot = words.get("uuid"), words.get("boot_id", "")
    if not isinstance(uuid, str) or not UUID.fullmatch(uuid) or not isinstance(boot, str) or not re.fullmatch(r"[0-9a-f-]{0,64}", boot):
        return None
    record = Record(uuid, words["class"], _count(words, "xid", 0), _text(words, "what"), _text(words, "hint"), boot)
    record = replace(record, count=_count(words, "count", 1), boots=_count(words, "boots", 1), driver=_count(words, "driver", 0))
    return replace(record, first_at=_time(words, "first_at"), last_at=_time(words, "last_at"))


def _text(words: Mapping[str, Any], key: str) -> str:
    """For people, and for terminals: nothing in it moves a cursor."""
    value = words.get(key)
    return "".join(each if each.isprintable() else "?" for each in value[:_TEXT]) if isinstance(value, str) else ""


def _count(words: Mapping[str, Any], key: str, low: int) -> int:
    value = words.get(key)
    return min(max(value, low), 1 << 30) if type(value) is int else low


def _time(words: Mapping[str, Any], key: str) -> float:
    value = words.get(key)
    is_time = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LATEST
    return float(value) if is_time and value is not None else 0.0
