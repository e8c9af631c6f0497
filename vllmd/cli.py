"""`vllmd`: the daemon and its stages, each also a command of its own; and the three commands that people chain with &&.

Imports are inside the verbs: `--help` must not pay for the daemon.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence

from vllmd import __version__
from vllmd.commandline import Parser, add_globals, guarded, streamed, take_globals
from vllmd.errors import UsageError


def _parser() -> Parser:
    parser = Parser(prog="vllmd", description="The supervisor daemon for vLLM, and its stages one by one.")
    parser.add_argument("--version", action="version", version=f"vllmd {__version__}")
    add_globals(parser)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, text in (
        ("run", "run an instance: what the unit vllmd@NAME.service executes"),
        ("check", "validate the configuration and print the plan; changes nothing"),
        ("preflight", "check port, GPU and host as the start would; print the report as JSON"),
        ("resolve", "find and verify the model; print where it is as JSON"),
        ("serve", "execute the engine alone, without supervision"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
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
            verb.epilog = "What stands behind -- is passed to the engine."
    _add_gpu_watch(verbs)
    return parser


def _add_gpu_watch(verbs: argparse._SubParsersAction[Parser]) -> None:
    """`--kmsg` and `--drm` are for tests: what stands in for the kernel's log, and for the directory of graphics cards."""
    text = "watch every GPU of this host: what the unit vllmd-gpu.service executes"
    verb = verbs.add_parser("gpu-watch", help=text, description=text)
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, as gpu_watch.interval_s=1")
    verb.add_argument("--kmsg", default=None, help=argparse.SUPPRESS)
    verb.add_argument("--drm", default="", help=argparse.SUPPRESS)


def overrides(pairs: Sequence[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            # No more than what can be a key: `serve.api_key:VALUE` holds a secret.
            shown = re.match(r"[\w.]*", pair, re.ASCII)
            raise UsageError("usage", f"--set {shown[0] if shown else ''}...: not KEY=VALUE", "as in --set serve.port=8001")
        found[key] = value
    return found


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what stands behind the first `--`."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _run(argv: Sequence[str]) -> int:
    paths, rest = take_globals(argv)
    own, engine_arguments = _split(rest)
    options: argparse.Namespace = _parser().parse_args(own)
    if engine_arguments and options.verb != "serve":
        raise UsageError("usage", f"vllmd {options.verb} passes nothing to the engine", "only `vllmd serve NAME -- ARGS` does")
    options.rest = engine_arguments
    options.overrides = overrides(options.set)
    from vllmd import verbs

    verb = {"run": verbs.run, "check": verbs.check, "preflight": verbs.preflight, "resolve": verbs.resolve, "serve": verbs.serve, "gpu-watch": verbs.gpu_watch}
    return verb[options.verb](options, paths)


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("vllmd", _run, argv)


def preflight_main() -> int:
    from vllmd.preflight.command import main as command

    return _as_today("vllm-preflight", lambda: command(sys.argv[1:], dict(os.environ)))


def resolve_main() -> int:
    from vllmd.models.command import main as command

    return _as_today("vllm-resolve-model", lambda: command(sys.argv[1:], dict(os.environ)))


def serve_main() -> int:
    from vllmd.engines.serve_command import main as command
    from vllmd.verbs import env_files

    return _as_today("vllm-serve", lambda: command(sys.argv[1:], dict(os.environ), env_files))


def _as_today(program: str, run: Callable[[], int]) -> int:
    """The commands that people chain have statuses of their own; 1 is any other failure."""
    return streamed(program, run, unwritable=1, bug=1)


if __name__ == "__main__":
    sys.exit(main())
