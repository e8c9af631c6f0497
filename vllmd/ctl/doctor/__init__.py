"""`vllmctl doctor`: what is wrong with this host, and the command that mends it.

Each check is a pure decision (checks_*.py) on facts that a child gathered (gather_*.py) under a deadline (jobs.py): neither a
driver that hangs nor a mount nor a network holds it up. Nothing is changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vllmd.commandline import Parser
from vllmd.config.paths import Paths

FOUND = 1
_DESCRIPTION = "What is wrong with this host, a line for each finding: where, what, and the command that mends it. Changes nothing."
_STATUSES = "Exit status: 0 nothing found, 1 findings. Not all can be seen by others than root; what could not is said."
_TIMEOUT_S, _SHORTEST_S, _LONGEST_S = 30.0, 2.0, 600.0


def main(argv: Sequence[str], paths: Paths) -> int:
    """Performs one command line; raises VllmdError."""
    options = _parser().parse_args(argv)
    return _perform(paths, options)


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl doctor", description=_DESCRIPTION, epilog=_STATUSES)
    top.add_argument("names", metavar="NAME", nargs="*", help="these instances, besides the host itself (default: all)")
    top.add_argument("--json", action="store_true", help="one JSON object, for programs")
    top.add_argument("--timeout", metavar="S", type=_seconds, default=_TIMEOUT_S, help=f"what has not answered by then is left (default {_TIMEOUT_S:.0f})")
    return top


def _seconds(text: str) -> float:
    value = float(text)
    if not _SHORTEST_S <= value <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"from {_SHORTEST_S:.0f} to {_LONGEST_S:.0f}")
    return value


def _perform(paths: Paths, options: argparse.Namespace) -> int:
    import json
    import sys

    from vllmd.ctl.doctor import show
    from vllmd.ctl.doctor.examine import Examination

    report = Examination(paths, options.names, options.timeout).report()
    if options.json:
        sys.stdout.write(json.dumps(show.as_dict(report)) + "\n")
    else:
        sys.stdout.write("\n".join(show.lines(report)) + "\n")
    return FOUND if report.findings else 0
