"""The inside of a unit: its settings given to a transient unit, which tries as its user what an engine would do.

A process that only becomes the unit's user would see neither the control group's list of devices nor the sandbox's mounts; one
that enters a running instance needs a running instance. `systemd-run` with the properties that `systemctl show` has, drop-ins
included, is as near as one comes without starting the instance.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllmd.config.paths import Paths
from vllmd.ctl.doctor import inside
from vllmd.ctl.doctor.facts import InsideFacts, UnitFacts
from vllmd.ctl.doctor.gather_host import group_name
from vllmd.ctl.doctor.gather_units import COPIED
from vllmd.errors import TryLater
from vllmd.preflight.gpu import child_environ

_SEVERAL = ("DeviceAllow",)
_LONGEST_S = 20


def look(paths: Paths, name: str, unit: UnitFacts | None, wanted: Mapping[str, list[str]]) -> InsideFacts:
    """`unit` None: instances run as this process does. TryLater where the transient unit fails."""
    wanted = {**wanted, "writable": [each for each in wanted["writable"] if Path(each).is_dir()]}
    said = inside.report(dict(wanted)) if unit is None else _in_unit(paths, name, unit, wanted)
    return InsideFacts(
        name,
        devices=said["devices"],
        readable=said["readable"],
        writable=said["writable"],
        cgroup=said["cgroup"],
        is_delegated=said["is_delegated"],
        controllers=frozenset(said["controllers"]),
        nofile=said["nofile"],
        owners={path: _owner(path) for path, number in said["devices"].items() if number == errno.EACCES},
    )


def _in_unit(paths: Paths, name: str, unit: UnitFacts, wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    scope = ["--user"] if paths.scope == "user" else []
    own = [f"--unit=vllmd-doctor-{os.getpid()}", f"--description=vllmctl doctor looks at the inside of vllmd@{name}.service", "--collect", "--quiet", "--wait", "--pipe"]
    argv = ["systemd-run", *scope, *own, *_properties(paths, name, unit), f"--setenv=PYTHONPATH={child_environ()['PYTHONPATH']}"]
    argv += [sys.executable, "-P", "-B", "-m", "vllmd.ctl.doctor.inside"]
    done = subprocess.run(argv, input=json.dumps(dict(wanted)), capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise TryLater("inside_unseen", f"a unit with the settings of vllmd@{name}.service does not run: {_last(done.stderr) or f'status {done.returncode}'}") from None
    return dict(found)


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""


def _properties(paths: Paths, name: str, unit: UnitFacts) -> Iterator[str]:
    for key in COPIED:
        value = unit[key]
        for each in value.splitlines() if key in _SEVERAL else [value]:
            if each and not (key == "CapabilityBoundingSet" and len(each) > 2000):
                yield f"--property={key}={each}"
    if "CapabilityBoundingSet" in unit.values and not unit["CapabilityBoundingSet"]:
        yield "--property=CapabilityBoundingSet="
    # What StateDirectory= and its like make writable; the directives themselves would chown what is there.
    yield f"--property=ReadWritePaths=-{paths.state} -{paths.cache} -{paths.instance_runtime(name)}"
    yield f"--property=RuntimeMaxSec={_LONGEST_S}"


def _owner(path: str) -> tuple[int, int, int, str]:
    try:
        found = Path(path).stat()
    except OSError:
        return (0, 0, 0, "")
    return (found.st_uid, found.st_gid, found.st_mode & 0o777, group_name(found.st_gid))
