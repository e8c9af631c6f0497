"""NAME.d/50-model.yaml, where a choice is kept: a drop-in like any other, with one comment that says what was chosen.

The comment carries the sum of what stands below it, so that what a person changed there by hand is noticed: it is put aside before
it is replaced, and that is said.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from vllmd.config import layers
from vllmd.config.layers import HOST_FILE
from vllmd.config.paths import Paths
from vllmd.config.yamlfile import Fraction
from vllmd.errors import PermissionMissing, VllmdError
from vllmd.system.files import directory_like, read_small, storage_error, write_atomic

DROP_IN = "50-model.yaml"
_MARK = "# vllmctl-model: "
_LIMIT_BYTES = 1 << 20
_PATIENCE_S, _LOOK_S = 10.0, 0.02


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the file remembers. `choice` is a preset's name where `is_preset`, else a model as it was given; '' nothing was chosen yet.
    `gpus`: what --gpus said. `is_cleared`: no model is selected, but the last choice is known. `is_edited`: by hand, since."""

    choice: str = ""
    is_preset: bool = False
    tier: str = ""
    flags: tuple[str, ...] = ()
    gpus: int | None = None
    is_cleared: bool = False
    is_edited: bool = False
    exists: bool = False


def path(paths: Paths, name: str) -> Path:
    return paths.config / f"{name}.d" / DROP_IN


def read(paths: Paths, name: str) -> Chosen:
    """PermissionMissing, or another VllmdError, where it is there and cannot be read."""
    try:
        text = read_small(Path(os.path.realpath(path(paths, name))), _LIMIT_BYTES).decode(errors="replace")  # a link is an administrator's right here
    except FileNotFoundError:
        return Chosen()
    except PermissionError as error:
        raise PermissionMissing("config_unreadable", f"{path(paths, name)}: {error.strerror}", f"sudo {paths.vllmctl} model show {name}") from None
    except OSError as error:
        raise storage_error(error, f"read {path(paths, name)}") from error
    return _parsed(text)


def _parsed(text: str) -> Chosen:
    head, mark, rest = text.partition(_MARK)
    line, _, body = rest.partition("\n")
    words: Any = None
    if mark:
        try:
            words = json.loads(line)
        except (ValueError, RecursionError):
            words = None
    if not isinstance(words, dict):
        return Chosen(is_edited=True, exists=True)
    flags, gpus = words.get("flags"), words.get("gpus")
    return Chosen(
        choice=str(words.get("choice", "")),
        is_preset=words.get("preset") is True,
        tier=str(words.get("tier", "")),
        flags=tuple(each for each in flags if isinstance(each, str)) if isinstance(flags, list) else (),
        gpus=gpus if isinstance(gpus, int) and not isinstance(gpus, bool) else None,
        is_cleared=words.get("cleared") is True,
        is_edited=words.get("sum") != _sum(body) or any(line and not line.startswith("#") for line in head.splitlines()),
        exists=True,
    )


def _sum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """What YAML can hold: a number with a point that was read from a file remembers its text, and no dumper knows it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Fraction):
        return float(value) if repr(float(value)) == value.written else value.written
    return value


def rendered(name: str, chosen: Chosen, settings: Mapping[str, Any], vllmctl: str) -> str:
    body = yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True, width=160)
    words: dict[str, Any] = {"choice": chosen.choice, "preset": chosen.is_preset, "tier": chosen.tier, "sum": _sum(body)}
    words |= {"flags": list(chosen.flags)} if chosen.flags else {}
    words |= {"gpus": chosen.gpus} if chosen.gpus is not None else {}
    words |= {"cleared": True} if chosen.is_cleared else {}
    head = (
        f"# Made by `{vllmctl} model set {name}`, which replaces it. What you want otherwise goes into a file that comes later,\n"
        f"# as {name}.d/60-mine.yaml: it wins, setting by setting.\n"
    )
    return f"{head}{_MARK}{json.dumps(words, ensure_ascii=True)}\n{body}"


@contextmanager
def overlay(paths: Paths, name: str, text: str, instance_text: str = "") -> Iterator[Paths]:
    """Places in which the instance's configuration is as it will be: what is wrong with it is told with its true paths. An empty `text`
    leaves the drop-in out; `instance_text` is the instance's own file where there is none yet."""
    with TemporaryDirectory(prefix="vllmctl-model-") as scratch:
        folder = Path(scratch)
        (folder / f"{name}.d").mkdir()
        files = [paths.config / HOST_FILE, paths.instance_config(name), *layers.drop_ins(paths, name)]
        for each in files:
            if (each.exists() or each.is_symlink()) and each != path(paths, name):
                (folder / each.relative_to(paths.config)).symlink_to(each)
        if instance_text:
            (folder / f"{name}.yaml").write_text(instance_text)
        if text:
            (folder / f"{name}.d" / DROP_IN).write_text(text)
        try:
            yield replace(paths, config=folder)
        except VllmdError as error:
            error.what, error.hint = (each.replace(scratch, str(paths.config)) for each in (error.what, error.hint))
            error.args = (error.what,)
            raise


@contextmanager
def alone(paths: Paths) -> Iterator[None]:
    """One change of these files at a time: two new instances at once would get the same free port. Whoever may read the directory can
    hold its lock, so nobody waits for it for long."""
    place = next(each for each in (paths.config, *paths.config.parents) if each.is_dir())
    try:
        directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # what is written will say why not
        return
    try:
        until = time.monotonic() + _PATIENCE_S
        while not _locked(directory) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(directory)


def _locked(directory: int) -> bool:
    with suppress(OSError):
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def write(paths: Paths, name: str, text: str, instance_text: str = "") -> list[str]:
    """One rename for each file; what was there by hand is put aside first. What a person should know of it. VllmdError."""
    target, own = path(paths, name), paths.instance_config(name)
    told = []
    try:
        if instance_text:
            paths.config.parent.mkdir(parents=True, exist_ok=True)  # a user who had no ~/.config
            directory_like(paths.config, paths.config.parent)
            _put(own, instance_text, paths.config)
            told.append(f"{own} was made")
        directory_like(target.parent, paths.config)
        if read(paths, name).is_edited:
            told.append(f"{target} was changed by hand: what stood there is {_aside(target)} now")
        _put(target, text, own if own.exists() else paths.config)
    except PermissionError as error:
        raise PermissionMissing("permission_missing", f"cannot write {target}: {error.strerror}", f"sudo {paths.vllmctl} model set {name} ...") from None
    except OSError as error:
        raise storage_error(error, f"write {target}") from error
    return told


def _put(target: Path, text: str, like: Path) -> None:
    """With the owner, and for a file the mode, of what the service can read already."""
    status = like.stat()
    write_atomic(target, text, mode=0o644 if like.is_dir() else status.st_mode & 0o664 | 0o600)
    if os.geteuid() == 0:
        os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)


def _aside(target: Path) -> Path:
    """Beside it, under a name that is no drop-in's."""
    number = 1
    while (kept := target.with_name(f"{target.name}.by-hand-{number}")).exists():
        number += 1
    status = target.stat()
    write_atomic(kept, target.read_bytes(), mode=status.st_mode & 0o777)
    return kept
