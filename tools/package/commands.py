"""The command lines as they are really parsed: what completions and man pages are made from, so that neither can drift.

A verb may hand its words to a parser of another module. So each parser is caught at the moment that it is asked to parse.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from vllmd import cli, ctl
from vllmd.engines.serve_command import main as serve
from vllmd.models.command import main as resolve
from vllmd.preflight.command import main as preflight


@dataclass(frozen=True, slots=True)
class Option:
    flags: tuple[str, ...]
    metavar: str
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Argument:
    metavar: str
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Command:
    """A command, or a verb of one."""

    words: tuple[str, ...]
    help: str
    description: str
    epilog: str
    usage: str
    options: tuple[Option, ...] = ()
    arguments: tuple[Argument, ...] = ()
    verbs: tuple[Command, ...] = field(default=())

    def walk(self) -> Iterator[Command]:
        yield self
        for verb in self.verbs:
            yield from verb.walk()


class NoParserError(Exception):
    """A verb of the help text that nothing parses."""


class _Caught(BaseException):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


Run = Callable[[Sequence[str]], Any]


def parser_of(run: Run, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser that gets the rest of a command line which begins with these words."""

    def catch(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Caught(self)

    before = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = catch  # type: ignore[method-assign]
    try:
        run([*words, "--help"])
    except _Caught as caught:
        return caught.parser
    finally:
        argparse.ArgumentParser.parse_args = before  # type: ignore[method-assign]
    raise NoParserError(" ".join(words))


def commands() -> tuple[Command, ...]:
    """All five."""
    own = tuple(_command(run, (name,), "", parser_of(run, ())) for name, run in (("vllmctl", ctl.run), ("vllmd", cli._run)))
    return (*own, *_plain())


def _command(run: Run, words: tuple[str, ...], text: str, parser: argparse.ArgumentParser) -> Command:
    options: list[argparse.Action] = []
    arguments: list[argparse.Action] = []
    verbs: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            verbs += _verbs(run, words, action)
        elif action.help != argparse.SUPPRESS:
            (options if action.option_strings else arguments).append(action)
    told = [Option(tuple(each.option_strings), _metavar(each), _help(each), _choices(each)) for each in options]
    given = [Argument(_metavar(each), _help(each), _choices(each)) for each in arguments]
    usage = " ".join(parser.format_usage().removeprefix("usage:").split())
    return Command(words, text, parser.description or "", parser.epilog or "", usage, tuple(told), tuple(given), tuple(verbs))


def _verbs(run: Run, words: tuple[str, ...], action: Any) -> Iterator[Command]:
    texts = {each.dest: each.help or "" for each in action._choices_actions}
    for name, parser in action.choices.items():
        delegated = not any(isinstance(each, argparse._HelpAction) for each in parser._actions)
        found = parser_of(run, [*words[1:], name]) if delegated else parser
        if delegated and name not in found.prog.split():
            raise NoParserError(f"{' '.join(words)} {name}: its words reach the parser of {found.prog!r}")
        yield _command(run, (*words, name), texts.get(name, ""), found)


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        return action.metavar
    # As argparse prints them.
    return "|".join(_choices(action)) or (action.dest.upper() if action.option_strings else action.dest)


def _choices(action: argparse.Action) -> tuple[str, ...]:
    return tuple(str(each) for each in action.choices or ())


def _help(action: argparse.Action) -> str:
    default = {"default": action.default, "prog": "", "dest": action.dest}
    return (action.help or "") % default


# -- the commands that people chain: few words, and a help text that says them all

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def _plain() -> Iterator[Command]:
    mains: dict[str, Callable[[], Any]] = {
        "vllm-preflight": lambda: preflight(["--help"], {}),
        "vllm-resolve-model": lambda: resolve(["--help"], {}),
        "vllm-serve": lambda: serve(["--help"], {}),
    }
    for name, main in mains.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main()
        text = printed.getvalue()
        flags = dict.fromkeys(_FLAG.findall(text))
        yield Command((name,), "", text, "", "", tuple(Option((flag,), "", "") for flag in flags))
