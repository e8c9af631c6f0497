"""The man pages: of commands from their parsers and docs/, of files and the journal from docs/."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tools.package import roff
from tools.package.commands import Command, Option, commands
from tools.package.wheels import CHECKOUT
from vllmd import __version__

SUMMARIES = {
    "vllmd": (8, "supervisor daemon for vLLM, and its stages"),
    "vllmctl": (1, "start, stop and look at the models that this host serves"),
    "vllm-preflight": (1, "check port and GPUs before vLLM is started"),
    "vllm-resolve-model": (1, "find and verify a model, for vllm-serve"),
    "vllm-serve": (1, "execute vLLM for the model that was resolved"),
}
DOCUMENTS = {"vllmd": "docs/vllmd.8.md", "vllmctl": "docs/vllmctl.1.md"}
"""What no parser knows of a command: its section `Description` stands before the verbs, the others behind them."""
STATUSES = ("README.md", "## When it ends\n", "## Exit status\n")
"""vllmd(8) has them too, under the name that a man page gives them."""
PAGES = {
    "vllmd.yaml.5": "configuration of vllmd",
    "vllmd.presets.5": "models, and how each kind of GPU serves them",
    "vllmd-journal.7": "what vllmd says in the journal",
}
"""Of docs/, whole."""
SEE_ALSO = ("vllmd(8)", "vllmctl(1)", "vllmd.yaml(5)", "vllmd.presets(5)", "vllmd-journal(7)", "systemctl(1)", "journalctl(1)")


def write(into: Path, epoch: int) -> None:
    for file, text in pages(datetime.fromtimestamp(epoch, UTC).date().isoformat()):
        target = into / f"man{file[-1]}" / f"{file}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def pages(date: str) -> Iterator[tuple[str, str]]:
    """(file, text) of each, as vllmd.8."""
    for command in commands():
        name = command.words[0]
        yield f"{name}.{SUMMARIES[name][0]}", page(command, date)
    for file, summary in PAGES.items():
        name, _, section = file.rpartition(".")
        head = roff.title(name, int(section), summary, date, __version__)
        yield file, head + roff.markdown((CHECKOUT / f"docs/{file}.md").read_text()) + _see_also(f"{name}({section})")


def page(command: Command, date: str) -> str:
    name = command.words[0]
    section, summary = SUMMARIES[name]
    parts = [roff.title(name, section, summary, date, __version__)]
    parts += _described(command) if command.usage else _plain(command)
    return "".join([*parts, _see_also(f"{name}({section})")])


def _sections(document: str) -> dict[str, str]:
    """Of a document: heading -> section, the heading included."""
    found = re.split(r"(?m)^(?=## )", (CHECKOUT / document).read_text())[1:]
    return {part.partition("\n")[0] + "\n": part for part in found}


def _more(name: str) -> tuple[str, str]:
    """What is told of a command before its options, and behind its verbs."""
    sections = _sections(DOCUMENTS[name])
    described = sections.pop("## Description\n").partition("\n")[2]
    if name == "vllmd":
        document, there, here = STATUSES
        sections = {here: _sections(document)[there].replace(there, here), **sections}
    return roff.markdown(described), "".join(roff.markdown(text) for text in sections.values())


def _see_also(own: str) -> str:
    return roff.heading("See also") + roff.escaped(", ".join(name for name in SEE_ALSO if name != own)) + "\n"


def _plain(command: Command) -> list[str]:
    """The help text says it all; its first line is the usage. What is laid out in columns stays so."""
    usage, _, text = command.description.partition("\n")
    parts = [roff.heading("Synopsis"), roff.inline(usage.removeprefix("usage: ")) + "\n", roff.heading("Description")]
    for block in text.strip("\n").split("\n\n"):
        lines = block.splitlines()
        parts.append(roff.code(lines) if any("  " in line for line in lines) else _paragraph(" ".join(lines)))
    return parts


def _described(command: Command) -> list[str]:
    before, behind = _more(command.words[0])
    parts = [roff.heading("Synopsis"), roff.inline(command.usage) + "\n", roff.heading("Description"), _paragraph(command.description), before, _paragraph(command.epilog)]
    parts += [roff.heading("Options"), *(_option(option) for option in command.options)]
    if command.verbs:
        parts += [roff.heading("Verbs"), *(_verb(verb) for top in command.verbs for verb in top.walk())]
    return [*parts, behind]


def _paragraph(text: str) -> str:
    return f".PP\n{roff.inline(text)}\n" if text else ""


def _verb(verb: Command) -> str:
    text = verb.help[:1].upper() + verb.help[1:] + "." if verb.help else ""
    told = verb.description if len(verb.description) > len(text) else text
    parts = [f".SS {roff.escaped(' '.join(verb.words))}\n", _paragraph(verb.usage), _paragraph(told)]
    parts += [roff.term(f"\\fI{roff.escaped(each.metavar)}\\fR", roff.inline(each.help)) for each in verb.arguments if each.help]
    parts += [_option(option) for option in verb.options if "--help" not in option.flags]
    return "".join([*parts, _paragraph(verb.epilog)])


def _option(option: Option) -> str:
    value = f" \\fI{roff.escaped(option.metavar)}\\fR" if option.metavar else ""
    flags = ", ".join(f"\\fB{roff.escaped(flag)}\\fR" for flag in option.flags)
    return roff.term(flags + value, roff.inline(option.help))
