"""Generations: the configurations of an instance that reached READY, so that one can go back to them.

    <state>/instances/NAME/generations/00007.json   the record, by the supervisor: sums of the files, the settings (redacted),
                                                    the model's version, the engine
    <config>/.generations/NAME/<sum>/               the files themselves, by whoever owns the configuration (`keep_files`)

The two are apart on purpose. What the supervisor writes, the service's account can write, and root must not take such text
into /etc/vllmd. So the record only names, by its sum, one of the sets of files that root itself has put aside when the
instance was READY (ExecStartPost= of the unit); a forged record can name nothing that was not a configuration before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.config import layers, show
from vllmd.config.given import BUILT_IN
from vllmd.config.layers import Loaded
from vllmd.config.paths import Paths
from vllmd.core.model import ResolvedModel
from vllmd.core.plan import Plan
from vllmd.instance.board import now_text
from vllmd.models import kept
from vllmd.models.store import manifest_name
from vllmd.system.files import read_small, write_atomic

FOLDER, FILES_FOLDER, BEFORE = "generations", ".generations", "before"
SCHEMA = 1
NAME = re.compile(r"(\d{5,9})\.json")
SUM = re.compile(r"[0-9a-f]{64}")
RECORD_BYTES, FILE_BYTES, MAX_FILES, SEEN = 1 << 20, 1 << 20, 200, 2000
PROTECTED = 2
"""The model versions of as many of the newest generations are never removed."""


def sum_of(sums: Mapping[str, str]) -> str:
    """Names a set of files: their names and the SHA-256 of each."""
    return hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()


def file_sums(loaded: Loaded, paths: Paths) -> dict[str, str]:
    """Of the files that were read, by their names in the directory of the configuration."""
    return {str(path.relative_to(paths.config)): value for path, value in loaded.sums.items()}


def describe(loaded: Loaded, paths: Paths, plan: Plan, model: ResolvedModel) -> dict[str, Any]:
    """The record, without number and times. No secret stands in it."""
    sums = file_sums(loaded, paths)
    executable = Path(plan.installed.executable)
    home = executable.parent.parent
    return {
        "configuration": sum_of(sums),
        "files": sums,
        "settings": _settings(loaded),
        "model": {
            "identity": model.identity,
            "directory": str(model.directory),
            "revision": model.revision,
            "version": manifest_name(model.directory) or model.manifest_sha256,
            "via": model.via,
        },
        "served_name": plan.served_name,
        "engine": {
            "name": plan.engine,
            "version": plan.installed.version,
            "variant": plan.installed.variant,
            "executable": str(executable),
            "directory": home.name if home.parent == paths.engines.resolve() else "",
        },
    }


def _settings(loaded: Loaded) -> dict[str, Any]:
    """What somebody set, by key, with where."""
    rows = show.config_rows(loaded.config)
    set_rows = {key: row for key, row in rows.items() if loaded.origins.get(key, BUILT_IN) != BUILT_IN}
    return {key: show.shown_value(row, loaded.config) for key, row in set_rows.items()}


def _identity(record: Mapping[str, Any]) -> tuple[object, ...]:
    """Two starts with the same are one generation."""
    model, engine = _part(record, "model"), _part(record, "engine")
    where = model.get("version") or model.get("directory")
    return record.get("configuration"), record.get("settings"), model.get("identity"), where, engine.get("executable"), engine.get("version")


# --- records, by the supervisor


@dataclass(frozen=True, slots=True)
class Written:
    number: int
    is_new: bool


def write(state: Path, store: Path, instance: str, record: Mapping[str, Any], keep: int) -> Written:
    """Adds a generation, or notes that the last one was READY again. Blocks. OSError, PermissionMissing."""
    folder = state / FOLDER
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    numbers = read_numbers(folder)
    last = read_record(folder, numbers[-1]) if numbers else {}
    is_new = not last or _identity(last) != _identity(json.loads(json.dumps(record)))
    number = (numbers[-1] + 1 if numbers else 1) if is_new else numbers[-1]
    times = {"first_ready_at": now_text()} if is_new else {"first_ready_at": last.get("first_ready_at", "")}
    starts = 1 if is_new else (last["starts"] if isinstance(last.get("starts"), int) else 0) + 1
    document = {"schema": SCHEMA, "number": number, **times, "last_ready_at": now_text(), "starts": starts, **record}
    write_atomic(folder / f"{number:05}.json", json.dumps(document, ensure_ascii=False, indent=1) + "\n", mode=0o640)
    numbers = sorted({*numbers, number})
    for old in numbers[:-keep]:
        (folder / f"{old:05}.json").unlink(missing_ok=True)
    newest = [read_record(folder, each) for each in numbers[-PROTECTED:]]
    kept.write(store, instance, [version for each in newest if (version := _published(each))])
    return Written(number, is_new)


def _published(record: Mapping[str, Any]) -> str:
    """The version in the store; '' for a model that lies elsewhere."""
    version, directory = (str(_part(record, "model").get(key, "")) for key in ("version", "directory"))
    return version if version and Path(directory).name == version else ""


def read_numbers(folder: Path) -> list[int]:
    with os.scandir(folder) as entries:
        return sorted(int(found[1]) for _, entry in zip(range(SEEN), entries, strict=False) if (found := NAME.fullmatch(entry.name)))


def read_record(folder: Path, number: int) -> dict[str, Any]:
    """{} where it cannot be understood."""
    try:
        value = json.loads(read_small(folder / f"{number:05}.json", RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- files, by the owner of the configuration


@dataclass(frozen=True, slots=True)
class Kept:
    """One file of a configuration, as it was."""

    content: bytes
    mode: int
    uid: int
    gid: int


def present_files(paths: Paths, instance: str) -> dict[str, Kept]:
    """The files that a start would read now, by name. OSError; layers' errors."""
    names = [Path(layers.HOST_FILE), Path(f"{instance}.yaml")]
    names += [path.relative_to(paths.config) for path in layers.drop_ins(paths, instance)]
    found = {}
    for name in names[:MAX_FILES]:
        with contextlib.suppress(FileNotFoundError):
            found[str(name)] = _read(paths.config / name)
    return found


def _read(path: Path) -> Kept:
    """Links are an administrator's right here; the copy has the content."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        content = file.read(FILE_BYTES + 1)
    if not stat.S_ISREG(status.st_mode) or len(content) > FILE_BYTES:
        raise OSError(22, "not a small regular file", str(path))
    return Kept(content, stat.S_IMODE(status.st_mode) & 0o777, status.st_uid, status.st_gid)


def sums_of(files: Mapping[str, Kept]) -> dict[str, str]:
    return {name: hashlib.sha256(each.content).hexdigest() for name, each in files.items()}


def owns_configuration(paths: Paths) -> bool:
    try:
        return paths.config.stat().st_uid == os.geteuid()
    except OSError:
        return False


def keep_files(paths: Paths, instance: str, *, keep: int, name: str = "") -> str:
    """Puts the files aside as they are now; the sum that names them (or `name`, replaced each time). Blocks. OSError."""
    files = present_files(paths, instance)
    name = name or sum_of(sums_of(files))
    folder = _folder(paths, instance)
    target = folder / name
    if SUM.fullmatch(name) and sums_of(kept_files(paths, instance, name)) == sums_of(files):
        os.utime(target)
    else:
        fresh = folder / f".new-{os.urandom(6).hex()}"
        try:
            write_files(fresh, files)
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    _prune(folder, keep)
    return name


def _folder(paths: Paths, instance: str) -> Path:
    """0700: the files may hold secrets."""
    folder = paths.config / FILES_FOLDER
    for each in (folder, folder / instance):
        each.mkdir(mode=0o700, exist_ok=True)
    return folder / instance


def write_files(directory: Path, files: Mapping[str, Kept]) -> None:
    """With their modes and, for root, owners. OSError."""
    directory.mkdir(mode=0o700, exist_ok=True)
    for name, each in files.items():
        path = directory / name
        path.parent.mkdir(mode=0o755, exist_ok=True)
        write_atomic(path, each.content, mode=each.mode)
        if os.geteuid() == 0:
            os.chown(path, each.uid, each.gid, follow_symlinks=False)


def _prune(folder: Path, keep: int) -> None:
    found = sorted((path for path in folder.iterdir() if SUM.fullmatch(path.name)), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    stale = [*found[keep:], *(path for path in folder.glob(".new-*") if path.is_dir())]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)


def kept_files(paths: Paths, instance: str, name: str) -> dict[str, Kept]:
    """A set that was put aside; {} where there is none, or where it is not what its name says. OSError."""
    directory = paths.config / FILES_FOLDER / instance / name
    if not directory.is_dir() or directory.is_symlink():
        return {}
    found = {str(path.relative_to(directory)): _read(path) for path in sorted(directory.rglob("*"))[:MAX_FILES] if path.is_file()}
    is_sound = not SUM.fullmatch(name) or sum_of(sums_of(found)) == name
    return found if is_sound else {}


def remember(paths: Paths, instance: str, loaded: Loaded, plan: Plan, model: ResolvedModel) -> Callable[[], Written]:
    """What the supervisor does when READY, off its loop: the record, and the files where they are its own."""
    record, keep = describe(loaded, paths, plan, model), loaded.config.start.keep_generations

    def work() -> Written:
        written = write(paths.instance_state(instance), plan.model.store, instance, record, keep)
        if owns_configuration(paths):
            keep_files(paths, instance, keep=keep)
        return written

    return work


# --- what changed


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Sequence[str]:
    """In words, what a generation has that the one before it had not. Both may be hostile."""
    found = []
    old, new = _part(before, "settings"), _part(after, "settings")
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if was != now:
            found.append(f"{key}: {_shown(was)} -> {_shown(now)}")
    for part, names in (("model", ("identity", "version", "directory")), ("engine", ("version", "executable"))):
        for name in names:
            was, now = _part(before, part).get(name), _part(after, part).get(name)
            if was != now:
                found.append(f"{part} {name}: {_shown(was)} -> {_shown(now)}")
                break
    if not found and before.get("configuration") != after.get("configuration"):
        found.append("the text of the files, no setting")
    return found


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _shown(value: object) -> str:
    text = "not set" if value is None else value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text[:12] if SUM.fullmatch(text) else text if len(text) <= 60 else text[:57] + "..."
