"""What a backup holds and where it goes back to: configuration, keys, credentials, generations.

Directories below the state belong to the service's account, and root reads and writes there: by system/folder, which follows no link.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from vllmd.config import layers, show
from vllmd.config.paths import Paths
from vllmd.config.redact import redact_text
from vllmd.ctl.backup_archive import FILE_BYTES, Entry, is_name
from vllmd.engines import registry
from vllmd.errors import VllmdError
from vllmd.instance.generations import FILES_FOLDER
from vllmd.system.files import storage_error
from vllmd.system.folder import Folder

Say = Callable[[str], None]
CREDENTIALS = {"credstore": Path("/etc/credstore"), "credstore.encrypted": Path("/etc/credstore.encrypted")}
_STRIPPED = "# Written by `vllmctl backup create --without-secrets`: secret settings and comments are not here.\n"
DEFAULTS = Path("/etc/default/vllmd")
_API_KEY = ".api-key"
_DEEPEST = 4
STATE_BYTES, STATE_FILES = 128 << 20, 10_000
"""Of what is in a backup, as much may be of the service's writing."""


def directory_of(paths: Paths) -> Path:
    """Where backups are kept: on a host where distributions keep theirs, which the service's account cannot touch."""
    if paths.scope == "system":
        return Path("/var/backups/vllmd")
    return paths.state / "backups" if paths.scope == "user" else paths.config.parent / "backups"


def gathered(paths: Paths, *, secrets: bool, say: Say) -> dict[str, Entry]:
    """The files of now. `secrets` False: no keys, no credentials, and of the configuration the YAML files without its secret values."""
    found = dict(_configuration(paths, say)) if secrets else dict(_without_secrets(paths, say))
    found |= dict(_instances(paths, secrets=secrets, say=say))
    if paths.scope == "system":
        found |= dict(_below("default", DEFAULTS.parent, (DEFAULTS.name,), say))
        for top, folder in CREDENTIALS.items() if secrets else ():
            names = sorted(each.name for each in folder.glob("vllmd.*")) if folder.is_dir() else []
            found |= dict(_below(top, folder, [name for name in names if name.endswith(_API_KEY)], say))
            for name in names:
                if not name.endswith(_API_KEY):
                    say(f"{folder / name} is left out: whoever gave that token gives another one")
    return found


def _configuration(paths: Paths, say: Say) -> Iterator[tuple[str, Entry]]:
    """Links are an administrator's right here, as for a start; what comes back is a plain file."""
    for folder, folders, names in os.walk(paths.config, followlinks=True):
        relative = Path(folder).relative_to(paths.config)
        folders[:] = sorted(folders) if len(relative.parts) < _DEEPEST else []
        yield from _below("/".join(("etc", *relative.parts)), Path(folder), sorted(names), say, follows=True)


def _below(top: str, folder: Path, names: tuple[str, ...] | list[str], say: Say, *, follows: bool = False) -> Iterator[tuple[str, Entry]]:
    for each in names:
        name, path = f"{top}/{each}", folder / each
        if not is_name(name):
            say(f"{path} is left out: no name that a backup takes")
            continue
        try:
            with open(os.open(path, os.O_RDONLY | (0 if follows else os.O_NOFOLLOW) | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
                about = os.fstat(stream.fileno())
                content = stream.read(FILE_BYTES + 1) if stat.S_ISREG(about.st_mode) else None
        except FileNotFoundError:
            if path.is_symlink():
                say(f"{path} is left out: it leads nowhere")
            continue
        except PermissionError as error:
            raise storage_error(error, f"read {path}") from error
        except OSError:  # a link
            content = None
        if content is None or len(content) > FILE_BYTES:
            say(f"{path} is left out: {'larger than 4 MiB' if content else 'no plain file'}")
            continue
        yield name, Entry(stat.S_IMODE(about.st_mode) & 0o644, content, *(_names_of(about) if top.startswith("etc") else ("", "")))


def _names_of(about: os.stat_result) -> tuple[str, str]:
    """Owner and group by name, '' for root's."""
    owner = group = ""
    with contextlib.suppress(KeyError):
        owner = pwd.getpwuid(about.st_uid).pw_name if about.st_uid else ""
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(about.st_gid).gr_name if about.st_gid else ""
    return owner, group


def _ids(paths: Paths, each: Entry) -> tuple[int, int]:
    """-1 for who is not here. A group may only read what is put back, so any will do; an owner could write, so it is the service or root."""
    user = group = -1
    with contextlib.suppress(KeyError, OSError):
        found = pwd.getpwnam(each.owner).pw_uid
        user = found if found == paths.state.stat().st_uid else -1
    with contextlib.suppress(KeyError):
        group = grp.getgrnam(each.group).gr_gid
    return user, group


def _without_secrets(paths: Paths, say: Say) -> Iterator[tuple[str, Entry]]:
    """A file whose secrets cannot be told, because it is no valid configuration, is left out."""
    hidden: set[str] = set()
    bad: set[str] = set()
    for path in sorted(paths.config.glob("*.yaml")):
        name = path.stem
        try:
            loaded = layers.load(paths, None if name == "vllmd" else name, {}, {}, lambda engine: registry.get(engine).tuning)
            hidden |= set(show.secrets(loaded.config))
        except VllmdError as error:
            bad.add(name)
            say(f"{path} is left out, since its secrets cannot be told: {error.what}")
    found: list[tuple[str, Entry, Any]] = []
    for entry, each in _configuration(paths, lambda _text: None):
        parts = entry.split("/")
        owner = parts[1].removesuffix(".yaml").removesuffix(".d")
        if parts[1] == FILES_FOLDER or not entry.endswith(".yaml") or owner in bad or (len(parts) > 2 and not parts[1].endswith(".d")):
            continue
        try:
            found.append((entry, each, yaml.safe_load(each.content)))
        except (yaml.YAMLError, ValueError, RecursionError):  # a drop-in of an instance that has no file
            say(f"{paths.config.joinpath(*parts[1:])} is left out, since its secrets cannot be told: it is no YAML")
    hidden |= {value for _, _, document in found for value in _named_secret(document)}
    for entry, each, document in found:
        text = yaml.safe_dump(_stripped(document, tuple(hidden)), sort_keys=False, allow_unicode=True)
        yield entry, replace(each, content=(_STRIPPED + text).encode())


def _named_secret(value: Any) -> Iterator[str]:
    """By the names that they have, wherever they stand: the same text may stand elsewhere as well."""
    for name, item in value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(item, str) and item and show.names_secret(str(name)):
            yield item
        yield from _named_secret(item)


def _stripped(value: Any, hidden: tuple[str, ...]) -> Any:
    """Secret settings are not there at all: a replacement would become a key that everybody knows."""
    if isinstance(value, Mapping):
        return {name: _stripped(item, hidden) for name, item in value.items() if not (show.names_secret(str(name)) or (isinstance(item, str) and item in hidden))}
    if isinstance(value, list):
        return [_stripped(item, hidden) for item in value]
    return redact_text(value, hidden) if isinstance(value, str) else value


def _instances(paths: Paths, *, secrets: bool, say: Say) -> Iterator[tuple[str, Entry]]:
    """As long as there is room: the service's account writes these, and must not keep the rest out of a backup."""
    left_bytes, left = STATE_BYTES, STATE_FILES
    for entry in _wanted(paths, say, secrets=secrets):
        *names, file = entry.split("/")
        try:
            with Folder.open(paths.state, *names) as folder:
                content = folder.read(file, FILE_BYTES)
        except FileNotFoundError:
            continue
        except PermissionError as error:
            raise storage_error(error, f"read {paths.state / entry}") from error
        except OSError as error:
            say(f"{paths.state / entry} is left out: {error.strerror}")
            continue
        if content is None:
            continue
        left, left_bytes = left - 1, left_bytes - len(content)
        if left < 0 or left_bytes < 0:
            say(f"{paths.state / entry} and what comes after it is left out: it is more than a backup takes")
            return
        yield entry, Entry(0o600 if file == "keys.json" else 0o644, content)


def _wanted(paths: Paths, say: Say, *, secrets: bool) -> Iterator[str]:
    """Of what is configured before the rest; keys before generations, and of these the newest first."""
    all_of_them = _names(say, paths.state, "instances")
    configured = {name for name in all_of_them if paths.instance_config(name).exists()}
    for group in (sorted(configured), [name for name in all_of_them if name not in configured]):
        found = [f"instances/{name}/keys.json" for name in group if secrets]
        for name in group:
            found += [f"instances/{name}/generations/{each}" for each in sorted(_names(say, paths.state, "instances", name, "generations"), reverse=True)]
        yield from filter(is_name, found)


def _names(say: Say, root: Path, *names: str) -> list[str]:
    """What is no directory has none: one stray file of the service's must not be the end of every backup."""
    try:
        with Folder.open(root, *names) as folder:
            return sorted(folder.names())[:10_000]
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            say(f"{root.joinpath(*names)} is left out: no directory")
            return []
        raise storage_error(error, f"read {root.joinpath(*names)}") from error


def place_of(paths: Paths, name: str) -> tuple[Path, tuple[str, ...], str]:
    """(a directory that is trusted, the names below it, the file's name)."""
    top, *between, file = name.split("/")
    if top == "etc":
        folder = paths.config.joinpath(*between)
        if between and folder.is_dir() and (real := folder.resolve()) != paths.config.resolve().joinpath(*between):
            return real, (), file  # a link of the administrator's, as NAME.d to a directory that something else manages
        return paths.config, tuple(between), file
    if top == "instances":
        return paths.state, (top, *between), file
    return (DEFAULTS.parent if top == "default" else CREDENTIALS[top]), (), file


def differing(paths: Paths, entries: Mapping[str, Entry]) -> list[str]:
    """Paths that exist with another content than the backup's."""
    return [str(root.joinpath(*names, file)) for name, each in entries.items() for root, names, file in [place_of(paths, name)] if _now(root, names, file) not in (None, each.content)]


def _now(root: Path, names: tuple[str, ...], file: str) -> bytes | None:
    try:
        with Folder.open(root, *names) as folder:
            return folder.read(file, FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise storage_error(error, f"read {root.joinpath(*names, file)}") from error
    except OSError:
        return b"\0what is no plain file is other than any"


def put_back(paths: Paths, entries: Mapping[str, Entry]) -> None:
    """Each file by one rename, with the owner of its directory. StorageFailed, PermissionMissing: what was put back by then stays."""
    with contextlib.suppress(FileExistsError):
        if any(name.startswith(f"etc/{FILES_FOLDER}/") for name in entries):
            paths.config.mkdir(mode=0o755, parents=True, exist_ok=True)
            (paths.config / FILES_FOLDER).mkdir(mode=0o700)
    for name, each in entries.items():
        root, names, file = place_of(paths, name)
        try:
            if root in CREDENTIALS.values():
                root.mkdir(mode=0o700, exist_ok=True)
            whose = _ids(paths, each) if name.startswith("etc/") else (-1, -1)
            with Folder.open(root, *names, make=True) as folder:
                folder.write(file, each.content, 0o600 if root in CREDENTIALS.values() else each.mode, whose)
        except OSError as error:
            raise storage_error(error, f"write {root.joinpath(*names, file)}") from error
