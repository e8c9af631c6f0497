"""vllmctl, the operator's command: thin fronts to systemctl, journalctl and the files that supervisors write.

Verbs import what they need when they run: `vllmctl --help` answers at once. Only this module turns errors into two
lines and an exit status.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vllmd import __version__
from vllmd.commandline import Parser, guarded, take_globals
from vllmd.config.paths import Paths

_DESCRIPTION = "Start, stop and look at the models that this host serves. Each is an instance: a unit vllmd@NAME.service."
_GLOBALS = "--user and --root DIR may stand before or after the verb."


def main() -> int:
    """The entry point of the command; returns its exit status."""
    return guarded("vllmctl", _permitted)


def _permitted(argv: Sequence[str]) -> int:
    """An administrator may close any directory to others: what a verb did not foresee is no bug of ours."""
    try:
        return run(argv)
    except PermissionError as error:
        from vllmd.errors import PermissionMissing

        raise PermissionMissing("permission_missing", f"{error.filename or 'it'}: {error.strerror}", "run it as root (sudo vllmctl ...), or as somebody who may read that") from None


def run(argv: Sequence[str]) -> int:
    """Performs one command line; raises VllmdError."""
    paths, rest = take_globals(argv)
    if rest[:1] == ["engine"]:
        from vllmd.ctl import engine

        return engine.main(rest[1:], paths)
    if rest[:1] == ["cache"]:
        from vllmd.ctl import cache

        return cache.main(rest[1:], paths)
    if rest[:1] == ["model"]:
        from vllmd.ctl import model

        return model.main(rest[1:], paths)
    if rest[:1] == ["store"]:
        from vllmd.ctl import store

        return store.main(rest[1:], paths)
    if rest[:1] == ["gpu"]:
        from vllmd.ctl import gpu

        return gpu.main(rest[1:], paths)
    if rest[:1] == ["doctor"]:
        from vllmd.ctl import doctor

        return doctor.main(rest[1:], paths)
    if rest[:1] == ["api-key"]:
        from vllmd.ctl import keys

        return keys.main(rest[1:], paths)
    if rest[:1] == ["backup"]:
        from vllmd.ctl import backup

        return backup.main(rest[1:], paths)
    arguments = _parser().parse_args(rest)
    return _perform(arguments, paths)


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl", description=_DESCRIPTION, epilog=_GLOBALS)
    top.add_argument("--version", action="version", version=f"vllmctl {__version__}")
    top.add_argument("--user", action="store_true", help="instances of your own user's systemd")
    top.add_argument("--root", metavar="DIR", help="everything below one directory: instances run by hand with `vllmd --root DIR run NAME` (start, restart, stop, logs and events need systemd)")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    _add_status(verbs)
    _add_health(verbs)
    _add_top(verbs)
    for verb, text in (("start", "start an instance and show its progress until it is ready"), ("restart", "stop and start it again")):
        _add_follow(verbs.add_parser(verb, help=text, description=text.capitalize()))
    stop = verbs.add_parser("stop", help="stop an instance; requests in flight may finish")
    stop.add_argument("name", metavar="NAME")
    stop.add_argument("--json", action="store_true", help="one JSON object, for programs")
    _add_pause(verbs)
    _add_logs(verbs)
    _add_events(verbs)
    _add_incidents(verbs)
    verbs.add_parser("api-key", help="show|list|add|rotate|revoke: the keys that clients send", add_help=False)
    _add_generations(verbs)
    gone = verbs.add_parser("forget", help="remove what an instance left whose configuration is gone", description="Remove what is left of an instance whose configuration is gone: its keys, incidents and generations, and what keeps versions of models for it.")
    gone.add_argument("name", metavar="NAME")
    gone.add_argument("--yes", action="store_true", help="do not ask")
    verbs.add_parser("backup", help="create|list|restore: configuration, keys and generations in one file", add_help=False)
    verbs.add_parser("engine", help="install|list|use|rollback|remove|verify: the engines of this host", add_help=False)
    verbs.add_parser("cache", help="list|clear: the caches of compiled code", add_help=False)
    verbs.add_parser("gpu", help="every GPU of this host, its owner and its health; gpu clear lifts a quarantine", add_help=False)
    verbs.add_parser("model", help="presets|set|show|clear|plan: which model an instance serves, chosen for this hardware", add_help=False)
    verbs.add_parser("doctor", help="what is wrong with this host, and the command that mends it", add_help=False)
    verbs.add_parser("store", help="list|verify|rm|gc|pin|unpin|export|import: the models of this host", add_help=False)
    return top


def _add_status(verbs: argparse._SubParsersAction[Parser]) -> None:
    status = verbs.add_parser("status", help="one screen about an instance, or about all", epilog="Exit status: 0 serving, 3 not.")
    status.add_argument("name", metavar="NAME", nargs="?", help="the instance; without it, all of them")
    status.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _add_health(verbs: argparse._SubParsersAction[Parser]) -> None:
    health = verbs.add_parser("health", help="may requests be sent there? for load balancers and scripts", epilog="Exit status: 0 ready, 1 failed or not running, 2 loading, 3 no model selected.")
    health.add_argument("name", metavar="NAME")
    health.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _add_top(verbs: argparse._SubParsersAction[Parser]) -> None:
    top = verbs.add_parser("top", help="all instances and GPUs on one live screen", epilog="Keys: q quits, ? shows the others. NO_COLOR=1 leaves colours out.")
    top.add_argument("--once", action="store_true", help="print one frame, as plain text")
    top.add_argument("--json", action="store_true", help="print the figures once, as one JSON object")
    top.add_argument("--sort", choices=("name", "state", "requests", "tokens", "kv"), default="name", help="the order (default: name)")
    top.add_argument("--interval", metavar="S", type=float, default=1.0, help="seconds between two looks (default 1)")


def _add_events(verbs: argparse._SubParsersAction[Parser]) -> None:
    events = verbs.add_parser("events", help="what supervisors said: starts, findings, failures, changes")
    events.add_argument("name", metavar="NAME", nargs="?", help="the instance; without it, all of them")
    events.add_argument("-f", "--follow", action="store_true", help="go on printing what comes")
    events.add_argument("-n", "--lines", metavar="N", help="the last N events, or all (default 50; with --since all)")
    events.add_argument("--since", metavar="TIME", help="as journalctl's: '10 min ago', today, ...")
    events.add_argument("--json", action="store_true", help="one JSON object a line, for programs")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):  # nan is neither
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number of seconds")
    return seconds


def _add_follow(verb: argparse.ArgumentParser) -> None:
    verb.epilog = "Exit status: 0 ready; else the status that the instance ended with (vllmd(8))."
    verb.add_argument("name", metavar="NAME")
    verb.add_argument("--no-wait", action="store_true", help="return at once")
    verb.add_argument("--timeout", metavar="S", type=_seconds, help="watch no longer than this; the start goes on")
    verb.add_argument("--json", action="store_true", help="one JSON object at the end, for programs")


def _add_pause(verbs: argparse._SubParsersAction[Parser]) -> None:
    pause = verbs.add_parser("pause", help="judge nothing for a while: a person works on the engine", epilog="A stop goes on as ever; what the engine does meanwhile is acted upon at the end.")
    pause.add_argument("name", metavar="NAME")
    pause.add_argument("--for", dest="for_text", metavar="TIME", default="1h", help="90, 10min, 1h, 2d (default 1h, at most 7d); it ends by itself")
    pause.add_argument("--why", metavar="TEXT", default="", help="shown wherever the pause is")
    resume = verbs.add_parser("resume", help="end a pause")
    resume.add_argument("name", metavar="NAME")
    for each in (pause, resume):
        each.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _add_logs(verbs: argparse._SubParsersAction[Parser]) -> None:
    logs = verbs.add_parser("logs", help="the journal of an instance")
    logs.add_argument("name", metavar="NAME")
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing what comes")
    logs.add_argument("-n", "--lines", metavar="N", help="the last N lines (default with -f: 50), or all")
    logs.add_argument("--since", metavar="TIME", help="as journalctl's: '10 min ago', today, ...")
    kind = logs.add_mutually_exclusive_group()
    kind.add_argument("--engine", dest="only", action="store_const", const="engine", help="only the engine's own lines")
    kind.add_argument("--events", dest="only", action="store_const", const="events", help="only the supervisor's events")
    form = logs.add_mutually_exclusive_group()
    form.add_argument("-o", "--output", metavar="FORMAT", help="as journalctl's: short-iso, json, cat, ...")
    form.add_argument("--json", dest="output", action="store_const", const="json", help="one JSON object a line: the journal's own entries, as journalctl -o json has them")


def _add_incidents(verbs: argparse._SubParsersAction[Parser]) -> None:
    incidents = verbs.add_parser("incidents", help="what an instance left when it failed: causes, stacks, last lines")
    incidents.add_argument("name", metavar="NAME")
    incidents.add_argument("id", metavar="ID", nargs="?", help="one of them: its name, the beginning or end of it, or last; without it, all are listed")
    incidents.add_argument("--part", metavar="FILE", help="print one of its files whole")
    incidents.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _add_generations(verbs: argparse._SubParsersAction[Parser]) -> None:
    listed = verbs.add_parser("generations", help="the configurations of an instance that reached READY")
    listed.add_argument("name", metavar="NAME")
    how = listed.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object, for programs")
    how.add_argument("--keep", action="store_true", help="put the files aside as they are now (what the unit does when it is ready)")
    back = verbs.add_parser("rollback", help="put a generation's configuration, model and engine back, and restart")
    back.add_argument("name", metavar="NAME")
    back.add_argument("generation", metavar="GENERATION", nargs="?", help="its number, or before: what the last rollback replaced (default: the newest that differs from now)")
    back.add_argument("--yes", action="store_true", help="do not ask")
    back.add_argument("--no-restart", action="store_true", help="only change the files")
    back.add_argument("--host-file", action="store_true", help="put vllmd.yaml back too, which all instances share")


def _perform(arguments: argparse.Namespace, paths: Paths) -> int:
    match arguments.verb:
        case "status":
            from vllmd.ctl import status

            return status.status(paths, arguments.name, as_json=arguments.json)
        case "health":
            from vllmd.ctl import health

            return health.health(paths, arguments.name, as_json=arguments.json)
        case "top":
            from vllmd.ctl import top

            return top.top(paths, arguments)
        case "events":
            from vllmd.ctl import events

            return events.events(paths, arguments)
        case "start" | "restart":
            from vllmd.ctl import follow

            return follow.bring_up(paths, arguments.verb, arguments.name, wait=not arguments.no_wait, timeout_s=arguments.timeout, as_json=arguments.json)
        case "pause":
            from vllmd.ctl import pause

            return pause.pause(paths, arguments.name, for_text=arguments.for_text, why=arguments.why, as_json=arguments.json)
        case "resume":
            from vllmd.ctl import pause

            return pause.resume(paths, arguments.name, as_json=arguments.json)
        case "incidents":
            from vllmd.ctl import incidents

            return incidents.incidents(paths, arguments.name, arguments.id, part=arguments.part, as_json=arguments.json)
        case "generations":
            from vllmd.ctl import generations

            if arguments.keep:
                return generations.keep(paths, arguments.name)
            return generations.show(paths, arguments.name, as_json=arguments.json)
        case "rollback":
            from vllmd.ctl import rollback

            options = rollback.Options(asks=not arguments.yes, restarts=not arguments.no_restart, host_file=arguments.host_file)
            return rollback.rollback(paths, arguments.name, arguments.generation, options)
        case "forget":
            from vllmd.ctl import forget

            return forget.forget(paths, arguments.name, asks=not arguments.yes)
        case "stop":
            from vllmd.ctl import follow

            return follow.bring_down(paths, arguments.name, as_json=arguments.json)
        case _:
            from vllmd.ctl import logs

            return logs.logs(paths, arguments)
