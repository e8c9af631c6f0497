"""What a process may do where it stands: `python -m vllmd.ctl.doctor.inside`, run in the sandbox of an instance's unit.

Reads what to try, as JSON, from its standard input; prints what came of it. Devices are opened, since that alone asks the
control group's list of devices; nothing is written.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def tried(paths: Iterable[str], attempt: Callable[[str], None]) -> dict[str, int]:
    """errno of each, 0 where it worked."""
    found = {}
    for path in paths:
        try:
            attempt(path)
            found[path] = 0
        except OSError as error:
            found[path] = error.errno or -1
    return found


def _open_device(path: str) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))


def _read(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def _write(path: str) -> None:
    """A directory: looked at, and not tried, since nothing may be left."""
    Path(path).stat()
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(13, "not writable", path)


def report(wanted: dict[str, Any]) -> dict[str, Any]:
    from vllmd.system import cgroupnames, procfs

    group = procfs.cgroup(os.getpid())
    directory = cgroupnames.unified_mount().directory(group) if group else ""
    return {
        "devices": tried(wanted.get("devices", ()), _open_device),
        "readable": tried(wanted.get("readable", ()), _read),
        "writable": tried(wanted.get("writable", ()), _write),
        "cgroup": group,
        "is_delegated": os.access(directory, os.W_OK | os.X_OK) if directory else None,
        "controllers": _words(directory),
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _words(directory: str) -> list[str]:
    try:
        return Path(directory, "cgroup.controllers").read_text(encoding="ascii").split() if directory else []
    except OSError:
        return []


if __name__ == "__main__":
    json.dump(report(json.load(sys.stdin)), sys.stdout)
