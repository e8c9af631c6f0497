"""What `vllmd` and `vllmctl` share on their command lines: where --user and --root may stand, and how an error looks."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gc
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from vllmd.config.paths import SYSTEM, Paths, root_paths, user_paths
from vllmd.config.values import printable
from vllmd.errors import Status, UsageError, VllmdError

INTERRUPTED = 130

atexit.register(gc.freeze)  # else Python looks for garbage among all that was imported, at the end: a fourteenth of a short command's time


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
    return printable(f"{program}: {what}\n" + (f"  hint: {hint}\n" if hint else ""))


def guarded(program: str, run: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a whole command; expected errors are two lines on stderr and their status, a bug of ours a traceback and 70."""

    def explained() -> int:
        try:
            return run(sys.argv[1:] if argv is None else argv)
        except VllmdError as error:
            sys.stderr.write(two_lines(program, error.what, error.hint))
            return int(error.status)

    return streamed(program, explained, unwritable=Status.IOERR, bug=Status.SOFTWARE)


def streamed(program: str, run: Callable[[], int], *, unwritable: int, bug: int) -> int:
    """Runs a command whatever its standard streams are: closed, full, a pipe that nobody reads, in an odd encoding."""
    _make_usable()
    status = 0
    try:
        status = _ended(run)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `vllmd check | head`
        _drop_output()
        return status
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            return _told_bug(bug)
        _drop_output()
        with contextlib.suppress(OSError):
            sys.stderr.write(two_lines(program, f"cannot write: {error.strerror}", "free space where the output goes; `df -h` shows it"))
        return unwritable
    except Exception:
        return _told_bug(bug)


def _ended(run: Callable[[], int]) -> int:
    try:
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # argparse after --help and --version
        return end.code if isinstance(end.code, int) else 0


def _told_bug(status: int) -> int:
    import traceback

    with contextlib.suppress(OSError):
        traceback.print_exc()
    return status


def _make_usable() -> None:
    """A closed descriptor would be given to the next file that is opened, and what is printed would go into that file.
    What the encoding of the output lacks is escaped instead of being a traceback."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - the lowest free one: `number`
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """What is left in the buffer must not fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
