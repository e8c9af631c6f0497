"""`vllmctl backup create|list|restore`: configuration, keys, credentials and generations of this host in one file.

What is read while instances run is whole: every such file is only ever replaced by a rename. Models are not in the file; with
--with-models each published one is exported beside it (`vllmctl store export`).

JSON of `list`, schema 1: {"schema": 1, "directory", "backups": [{"file", "bytes", "created_at", "version", "secrets", "instances", "files", "models", "damaged"}]}.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllmd import __version__
from vllmd.commandline import Parser
from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.ctl import backup_archive as archive
from vllmd.ctl import backup_places as places
from vllmd.ctl.backup_archive import Backup
from vllmd.errors import UsageError, VllmdError
from vllmd.system.files import storage_error

_DESCRIPTION = "Keep what an administrator of vllmd has made of this host, and put it back: also after a purge, and on another host."
_RESTORE = (
    "The file is checked whole before anything is written. What is there with another content stays, unless --force is given; then a backup of it is made first. "
    "Files that the backup does not know are left alone. Instances that run take their configuration at their next start."
)


def main(argv: Sequence[str], paths: Paths) -> int:
    """One command line; VllmdError."""
    options = _parser().parse_args(argv)
    match options.verb:
        case "create":
            return _create(paths, options)
        case "list":
            return _list(options.place or places.directory_of(paths), as_json=options.json)
        case _:
            return _restore(paths, options.file, force=options.force)


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl backup", description=_DESCRIPTION)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    create = verbs.add_parser("create", help="write a backup, also while instances run", description="Write a backup of mode 0600.")
    create.add_argument("-o", "--output", metavar="FILE", type=Path, help="where (default: a file with the time in its name in /var/backups/vllmd)")
    create.add_argument("--without-secrets", action="store_true", help="no keys, credentials or secret settings; of the configuration only YAML files, without comments")
    create.add_argument("--with-models", action="store_true", help="also export each published model, into the directory FILE.models")
    listed = verbs.add_parser("list", help="the backups, and what is in each", description="The backups, and what is in each.")
    listed.add_argument("place", metavar="DIR|FILE", nargs="?", type=Path, help="default: /var/backups/vllmd")
    listed.add_argument("--json", action="store_true", help="one JSON object, for programs")
    restore = verbs.add_parser("restore", help="put a backup back", description=_RESTORE)
    restore.add_argument("file", metavar="FILE", type=Path)
    restore.add_argument("--force", action="store_true", help="replace what is there with another content, after a backup of it")
    return top


# -- create


def _create(paths: Paths, options: argparse.Namespace) -> int:
    path = options.output or _new(paths)
    backup = Backup(_now(), __version__, not options.without_secrets, places.gathered(paths, secrets=not options.without_secrets, say=_say))
    if not any(name.startswith("etc/") for name in backup.entries):
        raise UsageError("nothing_to_back_up", f"there is no configuration in {paths.config}", "`vllmctl --root DIR` and `--user` have places of their own")
    if options.with_models:
        _write_with_models(paths, path, backup)
    else:
        archive.write(path, backup)
    models = f", {len(list(_models(path).iterdir()))} models beside it" if options.with_models else ""
    _say(f"{path}: {len(backup.entries)} files, {'with' if backup.has_secrets else 'without'} secrets{models}")
    sys.stdout.write(f"{path}\n")
    return 0


def _new(paths: Paths) -> Path:
    folder = places.directory_of(paths)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, f"make {folder}") from error
    return folder / f"vllmd-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.tar"


def _write_with_models(paths: Paths, path: Path, backup: Backup) -> None:
    """Both, or neither: models without their backup would be in the way of the next one of that name."""
    folder = _models(path)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise UsageError("backup_exists", f"{folder} exists already", "give another name (-o)") from None
    except OSError as error:
        raise storage_error(error, f"make {folder}") from error
    try:
        archive.write(path, replace(backup, models=_exported(paths, folder)))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _exported(paths: Paths, folder: Path) -> tuple[str, ...]:
    """Each current published model, as `vllmctl store export` does it. Not by a command line: an id may be what the service's account
    wrote, and one that was `-h` ended the backup with a help text and status 0."""
    from vllmd.ctl import store, store_move
    from vllmd.ctl.store_chosen import look
    from vllmd.models.catalog import PUBLISHED_KIND

    place = store.place_of(paths, None, os.environ)
    names: list[str] = []
    for item in look(place).items:
        if item.kind == PUBLISHED_KIND and item.is_current:
            name = f"{len(names)}-{re.sub('[^A-Za-z0-9._-]', '-', item.identity)[:150]}.tar"
            store_move.export(place, item.identity, item.version, str(folder / name), None)
            names.append(name)
    return tuple(names)


def _models(path: Path) -> Path:
    return path.with_name(f"{path.name}.models")


# -- list


def _list(place: Path, *, as_json: bool) -> int:
    try:
        files = sorted(place.glob("*.tar")) if place.is_dir() else [place]
        found = [_described(each) for each in files]
    except OSError as error:
        raise storage_error(error, f"read {place}") from error
    if as_json:
        sys.stdout.write(json.dumps({"schema": 1, "directory": str(place), "backups": found}) + "\n")
        return 0
    if not found:
        sys.stdout.write(f"no backups in {place}: `vllmctl backup create` makes one\n")
    for each in found:
        what = f"damaged: {each['damaged']}" if each["damaged"] else f"{each['created_at']}, {each['files']} files, {'with' if each['secrets'] else 'without'} secrets, instances: {', '.join(each['instances']) or 'none'}"
        models = f", {each['models']} models beside it" if each["models"] else ""
        sys.stdout.write(f"{printable(str(each['file']))}: {what}{models}\n")
    return 0


def _described(path: Path) -> dict[str, Any]:
    words: dict[str, Any] = {"file": str(path), "created_at": "", "version": "", "secrets": False, "instances": [], "files": 0, "models": 0, "damaged": ""}
    try:
        backup = archive.read(path)
    except UsageError:
        raise
    except VllmdError as error:
        return {**words, "bytes": 0, "damaged": error.what}
    more = {"created_at": backup.created_at, "version": backup.version, "secrets": backup.has_secrets, "instances": list(backup.instances), "files": len(backup.entries)}
    return {**words, **more, "bytes": path.stat().st_size, "models": len(backup.models)}


# -- restore


def _restore(paths: Paths, path: Path, *, force: bool) -> int:
    backup = archive.read(path)
    for name in backup.models:  # before anything is written: without them instances would not start
        if not (_models(path) / name).is_file():
            raise UsageError("model_missing", f"the model {name} is not in {_models(path)}", "copy that directory with the backup")
    if paths.scope != "system" and (foreign := [name for name in backup.entries if not name.startswith(("etc/", "instances/"))]):
        _say(f"left out, since they are of the whole host: {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}")
        backup = replace(backup, entries={name: each for name, each in backup.entries.items() if name not in foreign})
    other = places.differing(paths, backup.entries)
    if other and not force:
        shown = "\n  ".join([*other[:10], *(["..."] if len(other) > 10 else [])])
        raise UsageError("would_replace", f"{len(other)} files are there with another content:\n  {shown}", "--force replaces them, after a backup of what is there now")
    if other:
        before = _new(paths)
        archive.write(before, Backup(_now(), __version__, True, places.gathered(paths, secrets=True, say=_say)))  # noqa: FBT003
        _say(f"what was there is kept in {before}")
    places.put_back(paths, backup.entries)
    if backup.models:
        from vllmd.ctl import store

        for name in backup.models:
            store.main(["import", str(_models(path) / name)], paths)
    _say(f"{len(backup.entries)} files are back" + (f", and {len(backup.models)} models" if backup.models else ""))
    if not backup.has_secrets:
        _say("the backup has no secrets: keys are made anew at the next start; secret settings must be written again")
    if backup.instances:
        _say(f"instances take them at their next start: {paths.vllmctl} restart NAME, of {', '.join(backup.instances)}")
    return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _say(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


