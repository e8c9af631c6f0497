"""`vllmctl gpu`: every GPU of this host, who has it and whether it can be used; `vllmctl gpu clear` lifts a quarantine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from vllmd.commandline import Parser
from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.core.xids import recovery
from vllmd.ctl import gpu_facts as facts
from vllmd.ctl import gpu_show as show
from vllmd.ctl.gpu_facts import Host, Seen
from vllmd.errors import GpuUnavailable, PermissionMissing, UsageError
from vllmd.gpu import quarantine
from vllmd.gpu.quarantine import Record

NOT_USABLE = 3
_DESCRIPTION = "Every GPU of this host: who has it, how it is, and whether an instance may use it."
_STATUSES = "Exit status: 0 every GPU can be used (or there is none), 3 one cannot, 69 the driver does not answer."
_CLEAR = (
    "Lifts a quarantine, after what it asks for was done: for class reset, once the driver wants no reset any more; class "
    "reboot is lifted by the reboot itself; class replace, where a person has looked at the card, with --force."
)

_WHY = {"reboot": "a reboot lifts it, and nothing else helps", "replace": "a person must have looked at the card, and says so with --force"}


def main(argv: Sequence[str], paths: Paths) -> int:
    """Performs one command line; raises VllmdError."""
    arguments = _parser().parse_args(argv)
    if arguments.verb == "clear":
        return _clear(paths, arguments.gpu, force=arguments.force)
    return _list(paths, as_json=arguments.json)


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl gpu", description=_DESCRIPTION, epilog=_STATUSES)
    top.add_argument("--json", action="store_true", help="one JSON object, for programs")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    clear = verbs.add_parser("clear", help="lift the quarantine of a GPU", description=_CLEAR)
    clear.add_argument("gpu", metavar="UUID|INDEX", help="the GPU: its index, or (the beginning of) its UUID")
    clear.add_argument("--force", action="store_true", help="although its class or the driver says otherwise")
    return top


def _list(paths: Paths, *, as_json: bool) -> int:
    host = facts.look(paths)
    if as_json:
        sys.stdout.write(json.dumps(show.as_dict(host)) + "\n")
    else:
        sys.stdout.write(printable("\n".join(show.table(host))) + "\n")
    if host.stuck_in:
        return int(GpuUnavailable.status)
    return 0 if all(each.is_usable for each in host.gpus) else NOT_USABLE


# -- clear


def _clear(paths: Paths, token: str, *, force: bool) -> int:
    host = facts.look(paths)
    seen = _one(host, token)
    record = seen.quarantine
    if record is None:
        is_forgotten = force and bool(seen.uuid) and _lift(paths, seen)
        sys.stdout.write(f"GPU {seen.label} is not quarantined" + (", and what earlier boots knew of it is forgotten\n" if is_forgotten else "\n"))
        return 0
    if not force:
        _refuse_early(seen, record)
    _lift(paths, seen)
    sys.stdout.write(printable(f"the quarantine of GPU {seen.label} is lifted (it was: {record.what})") + "\n")
    return 0


def _lift(paths: Paths, seen: Seen) -> bool:
    """False where there was no file of it."""
    try:
        return quarantine.clear(paths, seen.uuid)
    except ValueError:  # a driver that is not NVIDIA's names its GPUs as it likes
        return False
    except OSError as error:
        hint = "Run it as root (sudo vllmctl gpu clear ...)."
        raise PermissionMissing("permission_missing", f"cannot lift the quarantine of GPU {seen.label}: {error.strerror}", hint) from None


def _one(host: Host, token: str) -> Seen:
    found = [each for each in host.gpus if (token.isdecimal() and each.index == int(token)) or (len(token) > 4 and each.uuid.startswith(token))]
    if len(found) != 1:
        there = ", ".join(each.label for each in host.gpus) or "none"
        what = f"{len(found)} GPUs are called {token!r}" if found else f"there is no GPU {token!r}"
        raise UsageError("gpu_unknown", what, f"There are: {there}.")
    return found[0]


def _refuse_early(seen: Seen, record: Record) -> None:
    force = f"(If you know better: `vllmctl gpu clear --force {seen.uuid}`.)"
    if seen.lost or seen.recovery_action:  # not the verdict: that is the quarantine itself, as long as it stands
        wanted = seen.lost.replace("_", " ") or f"the driver wants more ({recovery(seen.recovery_action or 0).what})"
        what = f"GPU {seen.label} still cannot be used: {wanted}"
        raise GpuUnavailable("gpu_still_sick", what, f"{seen.hint or facts.todo(record)} {force}")
    if record.cls != "reset":
        what = f"the quarantine of GPU {seen.label} is of class {record.cls}: {_WHY[record.cls]}"
        raise GpuUnavailable("gpu_needs_more", what, f"{facts.todo(record)} {force}")
