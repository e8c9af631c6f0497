"""`vllmctl engine`: the engines of this host. What it does is in vllmd/engines; here it is asked for, allowed and shown."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from vllmd.commandline import INTERRUPTED, Parser
from vllmd.config.paths import Paths
from vllmd.config.values import printable
from vllmd.ctl import engine_fit as fit
from vllmd.ctl import engine_list as listing
from vllmd.ctl import engine_trust as trust
from vllmd.engines import build, choice, install, locks, remove, verify
from vllmd.errors import Status, UsageError, VllmdError
from vllmd.models.amounts import size
from vllmd.preflight.variant import reason
from vllmd.system.hardware import of_this_host

_SHOWN = 20


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl engine", description="Install, choose and check the engines that instances run.")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    _add_install(verbs)
    shown = verbs.add_parser("list", help="the installed engines: which is chosen, which instances run or are pinned to which, what fits this host")
    shown.add_argument("--json", action="store_true", help="one JSON object")
    use = verbs.add_parser("use", help="choose an installed engine; instances take it at their next start")
    use.add_argument("name", metavar="NAME", help="directory name, as `vllmctl engine list` shows it")
    back = verbs.add_parser("rollback", help="choose the engine that was chosen before")
    for each in (use, back):
        _add_anyway(each)
    gone = verbs.add_parser("remove", help="remove an engine that nobody runs, has chosen or is pinned to")
    gone.add_argument("name", metavar="NAME", help="directory name")
    gone.add_argument("--anyway", action="store_true", help="although the configuration of an instance cannot be read, which may be pinned to it")
    check = verbs.add_parser("verify", help="every file of an engine against the sums that were recorded of it", epilog="Exit status: 0 whole, 65 not.")
    check.add_argument("name", metavar="NAME", nargs="?", help="directory name; the chosen one without it")
    check.add_argument("--json", action="store_true", help="one JSON object, with all that differs")
    return top


def _add_install(verbs: argparse._SubParsersAction[Parser]) -> None:
    add = verbs.add_parser("install", help="install a version of vLLM in an environment of its own, and choose it")
    add.add_argument("--version", metavar="V", help=f"version of vLLM (default: the one that --lock names, else {install.DEFAULT_VERSION})")
    variant = add.add_mutually_exclusive_group()
    for name, text in (("cpu", "the build for processors"), ("cuda", "for NVIDIA GPUs"), ("rocm", "for AMD GPUs; needs --index-url or --wheels")):
        variant.add_argument(f"--{name}", dest="variant", action="store_const", const=name, help=f"{text} (default: what fits this host)" if name == "cpu" else text)
    add.add_argument("--python", metavar="P", default="", help="Python to build with (default: /usr/bin/python3 if it fits, else the one that runs vllmctl)")
    add.add_argument("--wheels", metavar="DIR", type=Path, help="directory of wheels to install from, without any index")
    add.add_argument("--index-url", metavar="URL", default="", help="index to install from, instead of the one that pip is configured for")
    add.add_argument("--lock", metavar="FILE", type=Path, help="requirements with hashes: these files are installed, and no others")
    add.add_argument("--reinstall", action="store_true", help="build it anew although it is there (the old one stays until it is removed)")
    add.add_argument("--no-use", dest="use", action="store_false", help="install it, and leave the chosen engine as it is")
    spy = add.add_mutually_exclusive_group()
    spy.add_argument("--with-py-spy", dest="py_spy", action="store_const", const="yes", default="auto", help="fail where py-spy, which shows stacks in incidents, cannot be had (default: do without)")
    spy.add_argument("--without-py-spy", dest="py_spy", action="store_const", const="no", help="leave it out")
    _add_anyway(add)


def _add_anyway(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--anyway", action="store_true", help="although it does not fit this host's hardware")


def main(argv: list[str], paths: Paths) -> int:
    """Returns 0, or 130 after Ctrl-C; raises VllmdError."""
    arguments = parser().parse_args(argv)
    match arguments.verb:
        case "install":
            return _install(arguments, paths)
        case "list":
            return listing.show(paths, as_json=arguments.json)
        case "use":
            return _use(paths, arguments.name, anyway=arguments.anyway)
        case "rollback":
            return _rollback(paths, anyway=arguments.anyway)
        case "remove":
            return _remove(paths, arguments.name, anyway=arguments.anyway)
        case _:
            return _verify(paths.engines, arguments.name, as_json=arguments.json)


def _install(arguments: argparse.Namespace, paths: Paths) -> int:
    request = _request(arguments)
    trust.refuse(paths, request)
    if not arguments.anyway:
        fit.refuse_variant(request.variant)
    # A closed terminal ends it like Ctrl-C, unless nohup says otherwise.
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        install.install(paths.engines, request, _say, (lambda _record: None) if arguments.anyway else lambda known: fit.refuse(known, paths))
    except KeyboardInterrupt:
        _say("interrupted; nothing was changed")
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.use:
        _say_who_restarts(paths)
    return 0


def _request(arguments: argparse.Namespace) -> install.Request:
    variant = arguments.variant
    if variant is None:
        variant = fit.best()
        _say(f"the {variant} build, because {reason(variant, of_this_host())} (--cpu, --cuda or --rocm decides otherwise)")
    version = arguments.version
    if version is None and arguments.lock is not None:
        version = locks.pinned_version(arguments.lock, build.package(variant)).partition("+")[0]
    return install.Request(
        version=version or install.DEFAULT_VERSION,
        variant=variant,
        python=arguments.python,
        wheels=arguments.wheels,
        reinstall=arguments.reinstall,
        index_url=arguments.index_url,
        lock=arguments.lock,
        py_spy=arguments.py_spy,
        use=arguments.use,
    )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _use(paths: Paths, name: str, *, anyway: bool) -> int:
    known = choice.require(paths.engines, name)
    if not anyway:
        fit.refuse(known, paths)
    with choice.explained(f"choose {name}"), install.only_one(paths.engines):
        choice.choose(paths.engines, name)
    _say(f"{name} is the engine now; instances take it at their next start")
    _say_who_restarts(paths)
    return 0


def _rollback(paths: Paths, *, anyway: bool) -> int:
    name = choice.previous_name(paths.engines)
    if name and not anyway:
        fit.refuse(choice.require(paths.engines, name), paths)
    if not paths.engines.is_dir():
        raise UsageError("no_previous_engine", f"no engine is installed in {paths.engines}", "`vllmctl engine install` installs one")
    with choice.explained("go back"), install.only_one(paths.engines):
        name = choice.rollback(paths.engines)
    _say(f"{name} is the engine again; instances take it at their next start")
    _say_who_restarts(paths)
    return 0


def _say_who_restarts(paths: Paths) -> None:
    chosen = choice.current_name(paths.engines)
    waiting = [each.instance for each in listing.users(paths) if each.chosen == "current" and each.engine != chosen]
    if waiting:
        _say(f"still on another engine until they are restarted: {', '.join(waiting)} (vllmctl restart NAME)")


def _remove(paths: Paths, name: str, *, anyway: bool) -> int:
    choice.require(paths.engines, name)
    pins, unread = listing.pins(paths)
    if unread and not anyway:
        hint = "correct it, or say --anyway: an instance that is pinned to the engine could then not start"
        raise VllmdError("config_unreadable", f"it cannot be told whether an instance is pinned to {name}: {'; '.join(unread)}", hint, status=Status.CONFIG)
    running = [each.instance for each in listing.users(paths) if each.engine == name]
    remove.remove(paths.engines, name, sorted(instance for instance, engine in pins.items() if engine == name), running, _say)
    return 0


def _verify(engines: Path, name: str | None, *, as_json: bool) -> int:
    name = name or choice.current_name(engines)
    if not name:
        raise UsageError("engine_unknown", f"no engine is chosen in {engines}", "name one, as `vllmctl engine list` shows it")
    choice.require(engines, name)
    with choice.explained(f"verify {name}"):
        report = verify.verify(engines / name)
    if as_json:
        sys.stdout.write(json.dumps({"schema": 1, "ok": report.is_whole, **asdict(report)}) + "\n")
        return 0 if report.is_whole else int(Status.DATAERR)
    for what, paths in (("changed", report.changed), ("missing", report.missing), ("of no package", report.unrecorded), ("package", report.packages)):
        for path in paths[:_SHOWN]:
            sys.stdout.write(printable(f"{what}: {path}") + "\n")
        if len(paths) > _SHOWN:
            sys.stdout.write(f"{what}: ... and {len(paths) - _SHOWN} more (--json has them all)\n")
    sums = f"{report.checked} files, {size(report.bytes)}; pip recorded no sum of {report.without_hash} of them (bytecode)"
    seal = "" if report.is_sealed else "; it was installed before lists of packages were kept, so only files were compared"
    if not report.is_whole:
        count = len(report.changed) + len(report.missing) + len(report.unrecorded) + len(report.packages)
        what = f"{name} is not as it was installed: {count} difference{'s' if count > 1 else ''} ({sums}{seal})"
        raise VllmdError("engine_damaged", what, "`vllmctl engine install --reinstall` makes a new one beside it", status=Status.DATAERR)
    _say(f"{name} is as it was installed: {sums}{seal}")
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{printable(line)}\n")
    sys.stderr.flush()
