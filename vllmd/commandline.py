"""What `vllmd` and `vllmctl` share on their command lines: where --user and --root may stand, and how an error looks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from vllmd.config.paths import SYSTEM, Paths, root_paths, user_paths
from vllmd.errors import UsageError, VllmdError

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse's own exit status, 2, would read as 'foreign listener'."""

    def error(self, message: str) -> NoReturn:
        raise UsageError("usage", message, f"{self.prog} --help")


def take_globals(argv: Sequence[str]) -> tuple[Paths, list[str]]:
    """The places that --user and --root name, before or after the verb, and the command line without them. What stands
    behind `--` is the engine's."""
    rest: list[str] = []
    scopes: list[Paths] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--user":
            scopes.append(user_paths())
        elif word == "--root":
            scopes.append(_root(next(words, "")))
        elif word.startswith("--root="):
            scopes.append(_root(word.removeprefix("--root=")))
        else:
            rest.append(word)
    if len({paths.scope for paths in scopes}) > 1:
        raise UsageError("usage", "--user and --root exclude each other", "give one of them")
    return (scopes[-1] if scopes else SYSTEM), rest


def _root(directory: str) -> Paths:
    if not directory or directory.startswith("-"):
        raise UsageError("usage", "--root needs a directory", "as in --root DIR")
    return root_paths(Path(directory))


def add_globals(parser: argparse.ArgumentParser) -> None:
    """For --help alone: `take_globals` takes them before argparse sees them."""
    parser.add_argument("--user", action="store_true", help="the directories of your own user")
    parser.add_argument("--root", metavar="DIR", help="everything below one directory")


def two_lines(program: str, what: str, hint: str) -> str:
    return f"{program}: {what}\n" + (f"  hint: {hint}\n" if hint else "")


def guarded(program: str, run: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a whole command; expected errors are two lines on stderr and their status."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except VllmdError as error:
        sys.stderr.write(two_lines(program, error.what, error.hint))
        return int(error.status)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `vllmd check | head`: what is left in the buffer must not fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
