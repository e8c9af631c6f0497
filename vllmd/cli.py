"""`vllmd`: the daemon and its stages, each also a command of its own; and the three commands that people chain with &&.

Imports are inside the verbs: `--help` must not pay for the daemon.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from vllmd import __version__
from vllmd.config.paths import SYSTEM, Paths, root_paths, user_paths
from vllmd.errors import Status, UsageError, VllmdError


class Parser(argparse.ArgumentParser):
    """argparse's own exit status, 2, would read as 'foreign listener'."""

    def error(self, message: str) -> NoReturn:
        raise UsageError("usage", message, f"{self.prog} --help")


def add_globals(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """Options that stand before or after the verb. A verb's own default must not overwrite what stood before it."""
    default = None if top else argparse.SUPPRESS
    parser.add_argument("--user", action="store_true", default=False if top else default, help="directories of the user")
    parser.add_argument("--root", metavar="DIR", default=default, help="everything below one directory")


def chosen_paths(options: argparse.Namespace) -> Paths:
    if options.user and options.root:
        raise UsageError("usage", "--user and --root exclude each other", "give one of them")
    if options.root:
        return root_paths(Path(options.root))
    return user_paths(os.environ) if options.user else SYSTEM


def _parser() -> Parser:
    parser = Parser(prog="vllmd", description="The supervisor daemon for vLLM, and its stages one by one.")
    parser.add_argument("--version", action="version", version=f"vllmd {__version__}")
    add_globals(parser, top=True)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, text in (
        ("run", "run an instance: what the unit vllmd@NAME.service executes"),
        ("check", "validate the configuration and print the plan; changes nothing"),
        ("preflight", "check port, GPU and host as the start would; print the report as JSON"),
        ("resolve", "find and verify the model; print where it is as JSON"),
        ("serve", "execute the engine alone, without supervision"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        add_globals(verb, top=False)
        verb.add_argument("name", metavar="NAME", nargs="?" if name == "check" else None, help="the instance")
        verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, as serve.port=8001")
        if name == "check":
            verb.add_argument("--json", action="store_true", help="print the plan as JSON")
            verb.add_argument("--show-origin", action="store_true", help="print each value with where it came from")
        if name == "preflight":
            verb.add_argument("--dry-run", action="store_true", help="say what would be stopped, and stop nothing")
        if name == "serve":
            verb.add_argument("--print-cmd", action="store_true", help="print the command to stderr, then execute it")
            verb.add_argument("--dry-run", action="store_true", help="print the command and exit")
            verb.add_argument("rest", nargs=argparse.REMAINDER, metavar="-- ARGS", help="passed to the engine")
    return parser


def overrides(pairs: Sequence[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UsageError("usage", f"--set {pair}: not KEY=VALUE", "as in --set serve.port=8001")
        found[key] = value
    return found


def two_lines(program: str, error: VllmdError) -> int:
    print(f"{program}: {error.what}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)
    return int(error.status)


def _verbs() -> dict[str, Callable[[argparse.Namespace, Paths], int]]:
    from vllmd import verbs

    return {
        "run": verbs.run,
        "check": verbs.check,
        "preflight": verbs.preflight,
        "resolve": verbs.resolve,
        "serve": verbs.serve,
    }


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = _parser().parse_args(argv)
        options.overrides = overrides(options.set)
        return _verbs()[options.verb](options, chosen_paths(options))
    except VllmdError as error:
        return two_lines("vllmd", error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `vllmd check | head`: nobody reads any more. Keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Status.OK)


def preflight_main() -> int:
    from vllmd.preflight.command import main as command

    return command(sys.argv[1:], dict(os.environ))


def resolve_main() -> int:
    from vllmd.models.command import main as command

    return command(sys.argv[1:], dict(os.environ))


def serve_main() -> int:
    from vllmd.engines.serve_command import main as command

    return command(sys.argv[1:], dict(os.environ))


if __name__ == "__main__":
    sys.exit(main())
