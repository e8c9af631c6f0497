"""`vllmctl logs`: journalctl, with the unit and the kind of lines filled in; it replaces this process."""

from __future__ import annotations

import argparse
import os
import shutil
from typing import NoReturn

from vllmd.config.paths import Paths
from vllmd.ctl import unit as units

SYSLOG_IDENTIFIERS = {"engine": "vllmd-engine", "events": "vllmd"}
"""What the supervisor writes its engine's lines and its own events as (system/journal)."""


def logs(paths: Paths, arguments: argparse.Namespace) -> NoReturn:
    units.need_systemd(paths)
    argv = journalctl(
        units.instance_name(arguments.name),
        scope=paths.scope,
        follow=arguments.follow,
        lines=arguments.lines,
        since=arguments.since,
        only=arguments.only,
        output=arguments.output,
    )
    if shutil.which(argv[0]) is None:
        raise units.no_systemd()
    os.execvp(argv[0], argv)


def journalctl(name: str, *, scope: str, follow: bool, lines: str | None, since: str | None, only: str | None, output: str | None) -> list[str]:
    """The command line. Without a number of lines or a time: the whole of it, by pages; with --follow the last 50."""
    argv = ["journalctl"]
    argv += [f"--user-unit={units.unit(name)}"] if scope == "user" else [f"--unit={units.unit(name)}"]
    if only:
        argv.append(f"--identifier={SYSLOG_IDENTIFIERS[only]}")
    if follow:
        argv.append("--follow")
    if lines or follow:
        argv.append(f"--lines={lines or 50}")
    if since:
        argv.append(f"--since={since}")
    if output:
        argv.append(f"--output={output}")
    return argv
