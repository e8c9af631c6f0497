"""`vllmctl generations NAME`: the configurations of an instance that reached READY, and what each changed.

The records belong to the service's user, and root reads them: nothing is followed, everything is bounded, no character
reaches the terminal that is not printable.

JSON, schema 1: {"schema": 1, "instance", "directory", "present", "items": [...]}, the newest first; an item is the record
(vllmd/instance/generations) with "changes": [text], "kept": whether the files are here, "current": whether they are those
of now. `present` is the sum of the files as they are now, null where they may not be read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.config.paths import Paths
from vllmd.config.values import finite_json, printable
from vllmd.ctl import incidents
from vllmd.ctl import unit as units
from vllmd.ctl.files import text
from vllmd.ctl.store_list import table
from vllmd.errors import UsageError, VllmdError
from vllmd.instance import generations
from vllmd.system.files import storage_error


@dataclass(frozen=True, slots=True)
class Generation:
    """`is_kept` is None where this user may not look."""

    number: int
    record: Mapping[str, Any]
    changes: tuple[str, ...]
    is_kept: bool | None
    is_current: bool

    @property
    def configuration(self) -> str:
        """The sum that names its files; '' where the record says nothing that could be one."""
        found = text(self.record, "configuration")
        return found if generations.SUM.fullmatch(found) else ""


def show(paths: Paths, name: str, *, as_json: bool) -> int:
    instance = units.instance_name(name)
    found = look(paths, instance)
    if as_json:
        items = [{**each.record, "number": each.number, "changes": list(each.changes), "kept": each.is_kept, "current": each.is_current} for each in found]
        directory = str(paths.instance_state(instance) / generations.FOLDER)
        sys.stdout.write(json.dumps({"schema": 1, "instance": instance, "directory": directory, "present": present(paths, instance), "items": items}) + "\n")
        return 0
    if not found:
        sys.stdout.write(f"no generations of instance {instance}: none has been ready yet\n")
        return 0
    sys.stdout.write("\n".join(lines(found)) + "\n")
    return 0


def look(paths: Paths, instance: str) -> list[Generation]:
    """Newest first. PermissionMissing, StorageFailed."""
    with incidents.opened(paths, instance, generations.FOLDER) as folder:
        records = [(number, _read(folder.descriptor, number)) for number in _numbers(folder.descriptor)]
    now = present(paths, instance)
    found: list[Generation] = []
    before: Mapping[str, Any] = {}
    for number, record in records:
        changed = tuple(_plain(each) for each in generations.changes(before, record)) if before else ("the first",)
        one = Generation(number, record, changed, None, is_current=False)
        found.append(Generation(number, record, changed, _kept(paths, instance, one.configuration), is_current=bool(now) and one.configuration == now))
        before = record
    return found[::-1]


def _numbers(descriptor: int) -> list[int]:
    if descriptor < 0:
        return []
    with os.scandir(descriptor) as entries:
        return sorted(int(found[1]) for _, entry in zip(range(generations.SEEN), entries, strict=False) if (found := generations.NAME.fullmatch(entry.name)))


def _read(descriptor: int, number: int) -> dict[str, Any]:
    try:
        value = finite_json(incidents.read_at(descriptor, f"{number:05}.json", generations.RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def present(paths: Paths, instance: str) -> str | None:
    """The sum of the files as they are now; None where they cannot be read."""
    try:
        return generations.sum_of(generations.sums_of(generations.present_files(paths, instance)))
    except (OSError, VllmdError):
        return None


def _kept(paths: Paths, instance: str, name: str) -> bool | None:
    try:
        return bool(name and generations.kept_files(paths, instance, name))
    except OSError:
        return None


def _plain(value: str) -> str:
    return printable(value.replace("\n", " "))[:200]


def lines(found: list[Generation]) -> Iterator[str]:
    """What a person reads."""
    rows: list[tuple[str, ...]] = [("GENERATION", "LAST READY", "MODEL", "VERSION", "ENGINE", "")]
    more: list[list[str]] = []
    for each in found:
        record = each.record
        notes = ["as configured now"] if each.is_current else []
        notes += ["its files were not kept"] if each.is_kept is False else []
        engine = text(record, "engine", "directory") or " ".join((text(record, "engine", "name"), text(record, "engine", "version")))
        cells = (text(record, "last_ready_at"), text(record, "model", "identity"), text(record, "model", "version")[:12], engine, ", ".join(notes))
        rows.append((str(each.number), *(_plain(cell) for cell in cells)))
        more.append([f"    {change}" for change in each.changes])
    head, *listed = table(rows)
    yield head
    for line, below in zip(listed, more, strict=True):
        yield line
        yield from below


# --- by the unit, when the instance is READY


def keep(paths: Paths, name: str) -> int:
    """Puts the files aside as they are now (ExecStartPost= of the unit, as root)."""
    from vllmd.config import layers

    instance = units.instance_name(name)
    check_owner(paths)
    count = layers.load(paths, instance, {}, {}, _tuning).config.start.keep_generations
    try:
        generations.keep_files(paths, instance, keep=count)
    except OSError as error:
        raise storage_error(error, f"keep the configuration in {paths.config / generations.FILES_FOLDER}") from error
    return 0


def _tuning(name: str) -> type[Any]:
    from vllmd.engines import registry

    return registry.get(name).tuning


def check_owner(paths: Paths) -> None:
    """UsageError where root would follow what another user could have put there."""
    config = Path(paths.config)
    if os.geteuid() == 0 and config.is_dir() and config.stat().st_uid != 0:
        owner = config.stat().st_uid
        raise UsageError("foreign_configuration", f"{config} belongs to user {owner}, and not to root", f"chown root {config}, or run this as that user")
