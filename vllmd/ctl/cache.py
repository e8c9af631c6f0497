"""`vllmctl cache`: the caches of compiled code, with what they are for, their sizes and when they were used last."""

from __future__ import annotations

import argparse
import json
import secrets
import shlex
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllmd.commandline import Parser
from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.engines import caches, choice
from vllmd.engines.caches import Cache
from vllmd.errors import TryLater, UsageError
from vllmd.models.amounts import size
from vllmd.system.hardware import of_this_host
from vllmd.system.lockfile import is_locked
from vllmd.system.owner import as_owner
from vllmd.system.sharedlock import claim

_CLEARING = ".clearing-"
_BAD = "*.bad-*"


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl cache", description="Caches of compiled code, one for each engine on each hardware. A start without one compiles anew, which takes minutes.")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    shown = verbs.add_parser("list", help="what there is: size, last use, by whom")
    shown.add_argument("--json", action="store_true", help="one JSON object")
    clear = verbs.add_parser("clear", help="remove caches; never one that a running instance uses")
    what = clear.add_mutually_exclusive_group(required=True)
    what.add_argument("name", metavar="NAME", nargs="?", help="one of them, as `vllmctl cache list` shows it")
    what.add_argument("--unused", action="store_true", help="those of engines that are gone or of other hardware, and what was moved aside as broken")
    what.add_argument("--all", action="store_true", help="all that are not in use")
    return top


def main(argv: list[str], paths: Paths) -> int:
    """Returns 0; raises VllmdError."""
    arguments = parser().parse_args(argv)
    with as_owner(paths.cache), choice.explained(f"look at {caches.folder(paths)}"):
        if arguments.verb == "list":
            return _list(paths, as_json=arguments.json)
        if arguments.name is not None:
            return _clear_one(paths, arguments.name)
        return _clear(paths, unused_only=arguments.unused)


def _list(paths: Paths, *, as_json: bool) -> int:
    rows = [_row(paths, each) for each in caches.listed(caches.folder(paths))]
    if as_json:
        sys.stdout.write(json.dumps({"schema": 1, "directory": str(caches.folder(paths)), "caches": rows}) + "\n")
        return 0
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        state = "in use" if row["in_use"] else f"unused: {row['why_unused']}" if row["why_unused"] else f"used {_ago(row['used_at'])}"
        by = f" by {row['instance']}" if row["instance"] else ""
        aside = f"; {size(row['aside_bytes'])} of it moved aside as broken" if row["aside_bytes"] else ""
        sys.stdout.write(printable(f"{row['name']:<{width}}  {size(row['bytes']):>10}  {state}{by}{aside}") + "\n")
    if not rows:
        _say(f"no caches in {caches.folder(paths)}")
    return 0


def _row(paths: Paths, cache: Cache) -> dict[str, Any]:
    note = cache.note
    return {
        "name": cache.name,
        "engine": note.engine,
        "hardware": note.hardware,
        "bytes": cache.bytes,
        "aside_bytes": sum(caches.disk_bytes(each) for each in _aside(cache)),
        "instance": note.instance,
        "used_at": note.used_at,
        "in_use": is_locked(cache.directory),
        "why_unused": _why_unused(paths, cache),
    }


def _aside(cache: Cache) -> list[Path]:
    """What badcache moved: beside the caches that it moved."""
    return [each for parent in (cache.directory, cache.directory / "vllm") for each in parent.glob(_BAD) if each.is_dir() and not each.is_symlink()]


def _why_unused(paths: Paths, cache: Cache) -> str:
    """Why no start of today would use it; '' where one would, or where that cannot be told."""
    engine, _, hardware = cache.name.partition("+")
    program = Path(cache.note.program)
    if cache.note.program and not program.exists() and not (paths.engines / engine).exists():
        return "its engine is gone"
    host = of_this_host()
    if hardware.startswith(("nvidia-", "amd-")):
        vendor = hardware.partition("-")[0]
        models = hardware.partition("-")[2].rpartition("+")[0].rpartition("x")[0]
        here = "_".join(sorted({gpu.device for gpu in host.gpus if gpu.vendor == vendor})) or "gpu"
        driver = host.amd_driver if vendor == "amd" else host.nvidia_driver
        if models != here:
            return "it was made for other GPUs"
        return "" if hardware.rpartition("+")[2] == driver else "it was made with another driver"
    return "" if hardware in ("", caches.processor(host)) else "it was made for another processor"


def _ago(moment: str) -> str:
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(moment.replace("Z", "+00:00"))).total_seconds()
    except (ValueError, TypeError):
        return "at an unknown time"
    for length, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{int(seconds // length)} {name} ago"
    return "just now"


def _clear_one(paths: Paths, name: str) -> int:
    found = next((each for each in caches.listed(caches.folder(paths)) if each.name == name), None)
    if found is None:
        raise UsageError("cache_unknown", f"no cache {name} in {caches.folder(paths)}", "`vllmctl cache list` shows what there is")
    if not _remove(found.directory):
        raise TryLater("cache_in_use", f"{name} is in use by a running instance", "stop the instance first (`vllmctl status`)")
    _say(f"{name} is cleared ({size(found.bytes)})")
    return 0


def _clear(paths: Paths, *, unused_only: bool) -> int:
    folder, freed = caches.folder(paths), 0
    for leftover in folder.glob(f"{_CLEARING}*"):
        freed += _wiped(leftover)
    for each in caches.listed(folder):
        why = _why_unused(paths, each)
        if not unused_only or why:
            if _remove(each.directory):
                freed += each.bytes
                _say(f"{each.name} is cleared ({size(each.bytes)}{f': {why}' if why else ''})")
            else:
                _say(f"{each.name} is in use, and kept")
            continue
        for broken in _aside(each):
            freed += _wiped(broken)
            _say(f"{each.name}: {broken.name} is cleared, which had been moved aside as broken")
    _say(f"{size(freed)} freed" if freed else "nothing to clear")
    return 0


def _remove(directory: Path) -> bool:
    """Whole, by a rename first; False where somebody uses it. OSError."""
    release = claim(directory)
    if release is None:
        return False
    try:
        aside = directory.with_name(f"{_CLEARING}{secrets.token_hex(6)}")
        directory.rename(aside)
    finally:
        release()
    _wiped(aside)
    return True


def _wiped(directory: Path) -> int:
    """How many bytes went. What another user put into a cache may be left: the others are cleared all the same. OSError."""
    found = caches.disk_bytes(directory)
    try:
        shutil.rmtree(directory)
    except PermissionError:
        found -= caches.disk_bytes(directory)
        _say(f"{directory} holds files that are not the owner's of the cache, and stays: rm -r {shlex.quote(str(directory))}")
    return found


def _say(line: str) -> None:
    sys.stderr.write(f"{printable(line)}\n")
    sys.stderr.flush()
