"""`vllmctl engine install|list|use`: the engines of this host."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from vllmd.config.paths import Paths
from vllmd.engines import install
from vllmd.errors import UsageError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError("usage", message, f"{self.prog} --help")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="vllmctl engine", description="Install and choose the engine that instances run.")
    verbs = top.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    add = verbs.add_parser("install", help="install a version of vLLM in an environment of its own, and choose it")
    add.add_argument("--version", default=install.DEFAULT_VERSION, help="version of vLLM (default: %(default)s)")
    variant = add.add_mutually_exclusive_group()
    variant.add_argument("--cpu", dest="variant", action="store_const", const="cpu", help="the build for processors")
    variant.add_argument(
        "--cuda",
        dest="variant",
        action="store_const",
        const="cuda",
        help="the build for NVIDIA GPUs (default where there is a driver)",
    )
    add.add_argument(
        "--python",
        default="",
        help="Python to build with (default: /usr/bin/python3 if it fits, else the one that runs vllmctl)",
    )
    add.add_argument("--wheels", type=Path, help="directory of wheels to install from, without any index")
    add.add_argument(
        "--reinstall",
        action="store_true",
        help="build it anew although it is there (the old one stays until it is removed)",
    )
    shown = verbs.add_parser("list", help="show the installed engines")
    shown.add_argument("--json", action="store_true", help="one JSON object")
    use = verbs.add_parser("use", help="choose an installed engine; instances take it at their next start")
    use.add_argument("name", help="directory name, as `vllmctl engine list` shows it")
    return top


def main(argv: list[str], paths: Paths) -> int:
    """Returns 0, or 130 after Ctrl-C; raises VllmdError."""
    arguments = parser().parse_args(argv)
    match arguments.verb:
        case "install":
            return _install(arguments, paths)
        case "list":
            return _list(paths.engines, as_json=arguments.json)
        case _:
            install.choose(paths.engines, arguments.name)
            _say(f"{arguments.name} is the engine now; instances take it at their next start")
            return 0


def _install(arguments: argparse.Namespace, paths: Paths) -> int:
    variant = arguments.variant
    if variant is None:
        variant = "cuda" if install.has_nvidia_driver() else "cpu"
        _say(
            f"the {variant} build, because {'there is an' if variant == 'cuda' else 'there is no'} NVIDIA driver here (--cpu or --cuda decides otherwise)"
        )
    request = install.Request(arguments.version, variant, arguments.python, arguments.wheels, arguments.reinstall)
    # A closed terminal ends it like Ctrl-C, unless nohup says otherwise.
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        install.install(paths.engines, request, _say)
    except KeyboardInterrupt:
        _say("interrupted; nothing was changed")
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _list(engines: Path, *, as_json: bool) -> int:
    chosen = install.current_name(engines)
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "current": name == chosen,
            "version": known.version,
            "variant": known.variant,
            "torch": known.torch,
            "cuda": known.cuda,
            "archs": list(known.archs),
        }
        for name, known in install.installed_engines(engines)
    ]
    if as_json:
        sys.stdout.write(json.dumps({"schema": 1, "engines": found}) + "\n")
        return 0
    for engine in found:
        build = f"CUDA {engine['cuda']}" if engine["cuda"] else "CPU"
        sys.stdout.write(f"{'*' if engine['current'] else ' '} {engine['name']:<28} torch {engine['torch']}, {build}\n")
    if not found:
        _say(f"no engine in {engines}; `vllmctl engine install` installs one")
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
