"""`vllmctl events [NAME]`: what supervisors told the journal, one line an event; `--json` gives one object a line.

journalctl reads the journal, since it knows all its formats and who may read what; here its entries are taken for hostile input, as
any that the service's account could have written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import IO, Any

from vllmd.config.paths import Paths
from vllmd.ctl import files
from vllmd.ctl import unit as units
from vllmd.ctl.cells import clean
from vllmd.ctl.logs import journalctl
from vllmd.errors import UsageError, VllmdError

DEFAULT_LINES = "50"
EVERY = "*"
LEVELS = ("emergency", "alert", "critical", "error", "warning", "notice", "info", "debug")
_COLOURS = {0: "31", 1: "31", 2: "31", 3: "31", 4: "33"}
_LINE_BYTES = 1 << 20
_PREFIX = "VLLMD_"
_SPOKEN = {"VLLMD_INSTANCE", "VLLMD_EVENT"}


def events(paths: Paths, arguments: argparse.Namespace) -> int:
    units.need_systemd(paths)
    if arguments.lines not in (None, "all") and not (arguments.lines.isascii() and arguments.lines.isdigit()):
        raise UsageError("lines", f"-n {arguments.lines!r} is no number", "a number, or all")
    name = units.instance_name(arguments.name) if arguments.name else EVERY
    argv = command(name, scope=paths.scope, follow=arguments.follow, lines=arguments.lines, since=arguments.since)
    if shutil.which(argv[0]) is None:
        raise units.no_systemd()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        try:
            for entry in entries(reader.stdout):
                sys.stdout.write((json.dumps(as_dict(entry)) if arguments.json else shown(entry, colour=_is_coloured())) + "\n")
                if arguments.follow:
                    sys.stdout.flush()
        finally:
            with contextlib.suppress(ProcessLookupError):
                reader.terminate()
        status = reader.wait()
    if status > 0:
        raise VllmdError("journalctl_failed", f"journalctl ended with status {status}", "its own words stand above")
    return 0


def command(name: str, *, scope: str, follow: bool, lines: str | None, since: str | None) -> list[str]:
    wanted = lines or ("all" if since else DEFAULT_LINES)
    gpus = [f"--unit={units.GPU_WATCH}"] if name == EVERY and scope != "user" else []
    return [*journalctl(name, scope=scope, follow=follow, lines=wanted, since=since, only="events", output="json"), *gpus, "--no-pager"]


def entries(stream: IO[bytes]) -> Iterator[Mapping[str, Any]]:
    """One for each line that is a JSON object."""
    while line := stream.readline(_LINE_BYTES):
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry


def as_dict(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`fields`: what else the event says (launch id, cause, gpu, hint, ...), in lower case and without VLLMD_."""
    priority = _priority(entry)
    return {
        "schema": 1,
        "at": _at(entry),
        "instance": _field(entry, "VLLMD_INSTANCE"),
        "event": _field(entry, "VLLMD_EVENT"),
        "priority": priority,
        "level": LEVELS[priority],
        "text": _field(entry, "MESSAGE"),
        "fields": {key.removeprefix(_PREFIX).lower(): _field(entry, key) for key in sorted(entry) if key.startswith(_PREFIX) and key not in _SPOKEN},
    }


def shown(entry: Mapping[str, Any], *, colour: bool) -> str:
    said = as_dict(entry)
    at = files.moment(said, "at")
    hint = said["fields"].get("hint", "")
    text = clean(f"{said['text']}{f' (hint: {hint})' if hint else ''}".replace("\n", " | "))
    words = f"{said['level']:<7} {clean(said['instance']) or '-'} {clean(said['event']) or '-'}: {text}"
    paint = _COLOURS.get(said["priority"]) if colour else None
    return (f"{at:%Y-%m-%d %H:%M:%S} " if at else "") + (f"\x1b[{paint}m{words}\x1b[0m" if paint else words)


def _is_coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb")


def _field(entry: Mapping[str, Any], key: str) -> str:
    """journalctl gives bytes that are no text as a list of numbers, and a field that stands twice as a list."""
    value = entry.get(key)
    if isinstance(value, list):
        with contextlib.suppress(ValueError, TypeError):
            return bytes(value).decode(errors="replace")
        value = value[0] if value and isinstance(value[0], str) else ""
    return value if isinstance(value, str) else ""


def _priority(entry: Mapping[str, Any]) -> int:
    text = _field(entry, "PRIORITY")
    return int(text) if text in "01234567" and len(text) == 1 else 6


def _at(entry: Mapping[str, Any]) -> str:
    text = _field(entry, "__REALTIME_TIMESTAMP")
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(int(text) / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return ""
