"""What a backup holds and where it goes back to: configuration, keys, credentials, generations.

Directories below the state belong to the service's account, and root reads and writes there: by system/folder, which follows no link.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
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
            found |= dict(_below(top, folder, names, say))
    return found


def _configuration(paths: Paths, say: Say) -> Iterator[tuple[str, Entry]]:
    for folder, folders, names in os.walk(paths.config):
        folders.sort()
        relative = Path(folder).relative_to(paths.config)
        yield from _below("/".join(("etc", *relative.parts)), Path(folder), sorted(names), say)


def _below(top: str, folder: Path, names: tuple[str, ...] | list[str], say: Say) -> Iterator[tuple[str, Entry]]:
    for each in names:
        name, path = f"{top}/{each}", folder / each
        if not is_name(name):
            say(f"{path} is left out: no name that a backup takes")
            continue
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
                about = os.fstat(stream.fileno())
                content = stream.read(FILE_BYTES + 1) if stat.S_ISREG(about.st_mode) else None
        except FileNotFoundError:
            continue
        except PermissionError as error:
            raise storage_error(error, f"read {path}") from error
        except OSError:  # a link
            content = None
        if content is None or len(content) > FILE_BYTES:
            say(f"{path} is left out: {'larger than 4 MiB' if content else 'no plain file'}")
            continue
        yield name, Entry(stat.S_IMODE(about.st_mode) & 0o644, content)


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
    for entry, each in _configuration(paths, lambda _text: None):
        parts = entry.split("/")
        owner = parts[1].removesuffix(".yaml").removesuffix(".d")
        if parts[1] == FILES_FOLDER or not entry.endswith(".yaml") or owner in bad or (len(parts) > 2 and not parts[1].endswith(".d")):
            continue
        text = yaml.safe_dump(_stripped(yaml.safe_load(each.content), tuple(hidden)), sort_keys=False, allow_unicode=True)
        yield entry, Entry(each.mode, (_STRIPPED + text).encode())


def _stripped(value: Any, hidden: tuple[str, ...]) -> Any:
    """Secret settings are not there at all: a replacement would become a key that everybody knows."""
    if isinstance(value, Mapping):
        return {name: _stripped(item, hidden) for name, item in value.items() if not (show.names_secret(str(name)) or (isinstance(item, str) and item in hidden))}
    if isinstance(value, list):
        return [_stripped(item, hidden) for item in value]
    return redact_text(value, hidden) if isinstance(value, str) else value


def _instances(paths: Paths, *, secrets: bool, say: Say) -> Iterator[tuple[str, Entry]]:
    for instance in _names(paths.state, "instances"):
        for names, file in [((), "keys.json")] * secrets + [(("generations",), each) for each in _names(paths.state, "instances", instance, "generations")]:
            entry = "/".join(("instances", instance, *names, file))
            if not is_name(entry):
                continue
            try:
                with Folder.open(paths.state, "instances", instance, *names) as folder:
                    content = folder.read(file, FILE_BYTES)
            except FileNotFoundError:
                continue
            except PermissionError as error:
                raise storage_error(error, f"read {paths.state / entry}") from error
            except OSError as error:
                say(f"{paths.state / entry} is left out: {error.strerror}")
                continue
            if content is not None:
                yield entry, Entry(0o600 if file == "keys.json" else 0o644, content)


def _names(root: Path, *names: str) -> list[str]:
    try:
        with Folder.open(root, *names) as folder:
            return sorted(folder.names())[:10_000]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(error, f"read {root.joinpath(*names)}") from error


def place_of(paths: Paths, name: str) -> tuple[Path, tuple[str, ...], str]:
    """(a directory that is trusted, the names below it, the file's name)."""
    top, *between, file = name.split("/")
    if top == "etc":
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
            with Folder.open(root, *names, make=True) as folder:
                folder.write(file, each.content, 0o600 if root in CREDENTIALS.values() else each.mode)
        except OSError as error:
            raise storage_error(error, f"write {root.joinpath(*names, file)}") from error
