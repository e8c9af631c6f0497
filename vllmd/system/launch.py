"""launch.json: which engine was started last, so that a supervisor that was killed leaves nothing that its successor
cannot find and end. Written before the engine's exec; forgotten when nothing of it is left.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from vllmd.system.cgroup import PREFIX, kill_group, members, remove_group, wait_empty
from vllmd.system.cgroupnames import unified_mount
from vllmd.system.family import SWEEP_TIMEOUT_S, Leftover
from vllmd.system.files import read_small, write_atomic
from vllmd.system.host import Deadline, boot_id
from vllmd.system.members import Members

NAME = "launch.json"
SCHEMA = 1
_LIMIT_BYTES = 64 << 10
_ROUND_S = 0.02
_ID = re.compile("[0-9a-zA-Z-]{1,64}")


def _nobody(text: str) -> None:
    """Nobody is told."""


@dataclass(frozen=True, slots=True)
class Launch:
    """`start_time` in clock ticks since boot; `cgroup` as the kernel names it, or its directory, '' for none;
    `started_at` RFC 3339."""

    launch_id: str
    boot_id: str
    pid: int
    start_time: int
    cgroup: str
    uid: int
    started_at: str


def write(directory: Path, launch: Launch) -> None:
    """Durable when it returns. OSError."""
    write_atomic(directory / NAME, json.dumps({"schema": SCHEMA, **asdict(launch)}, indent=1) + "\n")


def read(directory: Path, warn: Callable[[str], None] = _nobody) -> Launch | None:
    """None when there is none, or when it cannot be understood: then `warn` is told why."""
    path = directory / NAME
    try:
        return _parse(json.loads(read_small(path, _LIMIT_BYTES)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        warn(f"{path} is ignored: {error}")
        return None


def forget(directory: Path) -> None:
    """Nothing is left of the launch. OSError other than absence."""
    (directory / NAME).unlink(missing_ok=True)


def _parse(value: object) -> Launch:
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise ValueError("not a launch record of schema 1")
    texts = {name: value.get(name) for name in ("launch_id", "boot_id", "cgroup", "started_at")}
    numbers = {name: value.get(name) for name in ("pid", "start_time", "uid")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("a text is missing")
    if not all(type(number) is int and number >= 0 for number in numbers.values()):
        raise ValueError("a number is missing")
    if not _ID.fullmatch(str(texts["launch_id"])) or numbers["pid"] in (0, 1):
        raise ValueError("the launch id or pid is impossible")
    return Launch(**texts, **numbers)  # type: ignore[arg-type]


async def recover(directory: Path, *, timeout_s: float = SWEEP_TIMEOUT_S, warn: Callable[[str], None] = _nobody) -> list[Leftover]:
    """End what the last launch of this instance left, if it was in this boot and of this user; then forget it.

    Processes are known by launch id, or by pid with start time and what descends from it; a pid alone counts for nothing.
    """
    launch = read(directory, warn)
    if launch is None or launch.boot_id != boot_id() or launch.uid != os.geteuid():
        return []
    in_group = await _end_group(launch, timeout_s)
    outside = await _end_processes(launch, timeout_s)
    pids = tuple(dict.fromkeys(in_group.pids + outside.pids))
    swept = Leftover(launch.launch_id, pids, in_group.gone and outside.gone)
    if swept.gone:
        forget(directory)
    return [swept] if pids else []


async def _end_group(launch: Launch, timeout_s: float) -> Leftover:
    directory = _group_of(launch)
    if directory is None or not directory.is_dir():
        return Leftover(launch.launch_id, (), gone=True)
    pids = members(directory)
    kill_group(directory)
    gone = await wait_empty(directory, timeout_s, killing=True) and remove_group(directory)
    return Leftover(launch.launch_id, pids, gone)


def _group_of(launch: Launch) -> Path | None:
    """Only a cgroup that was made for this very launch: a launch without one sat in somebody else's."""
    mount = unified_mount()
    path = mount.path(launch.cgroup) or launch.cgroup
    if Path(path).name != f"{PREFIX}{launch.launch_id}" or ".." in path.split("/") or not path.startswith("/"):
        return None
    directory = mount.directory(path)
    return Path(directory) if directory else None


async def _end_processes(launch: Launch, timeout_s: float) -> Leftover:
    left = Members(launch.launch_id, launch.uid, launch.pid, launch.start_time)
    pids = tuple(each.pid for each in left.find())
    deadline = Deadline(timeout_s)
    while left.kill():
        if deadline.passed:
            return Leftover(launch.launch_id, pids, gone=False)
        await asyncio.sleep(_ROUND_S)
    return Leftover(launch.launch_id, pids, gone=True)
