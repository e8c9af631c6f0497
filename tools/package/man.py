"""The man pages: of commands from their parsers, of files and statuses from docs/."""

from __future__ import annotations

import gzip
import re
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
MORE = {"vllmd": (("README.md", "When it ends"), ("docs/vllmd.8.md", ""))}
"""What no parser knows: sections of documents, or all of one."""
FILES = {"vllmd.yaml": "configuration of vllmd", "vllmd.presets": "models, and how each kind of GPU serves them"}
SEE_ALSO = "vllmd(8), vllmctl(1), vllmd.yaml(5), vllmd.presets(5), systemctl(1), journalctl(1)"


def write(into: Path, epoch: int) -> None:
    date = datetime.fromtimestamp(epoch, UTC).date().isoformat()
    for command in commands():
        section, _ = SUMMARIES[command.words[0]]
        _pack(into / f"man{section}/{command.words[0]}.{section}", page(command, date))
    for name, summary in FILES.items():
        text = (CHECKOUT / f"docs/{name}.5.md").read_text()
        _pack(into / f"man5/{name}.5", roff.title(name, 5, summary, date, __version__) + roff.markdown(text) + _see_also())


def _pack(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_name(target.name + ".gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def page(command: Command, date: str) -> str:
    name = command.words[0]
    section, summary = SUMMARIES[name]
    parts = [roff.title(name, section, summary, date, __version__)]
    parts += _described(command) if command.usage else _plain(command)
    parts += [roff.markdown(_section((CHECKOUT / document).read_text(), title)) for document, title in MORE.get(name, ())]
    return "".join([*parts, _see_also()])


def _section(text: str, title: str) -> str:
    if not title:
        return text
    return next(part for part in re.split(r"(?m)^(?=## )", text) if part.startswith(f"## {title}\n"))


def _see_also() -> str:
    return roff.heading("See also") + roff.escaped(SEE_ALSO) + "\n"


def _plain(command: Command) -> list[str]:
    """The help text says it all; its first line is the usage."""
    usage, _, text = command.description.partition("\n")
    return [roff.heading("Synopsis"), roff.inline(usage.removeprefix("usage: ")) + "\n", roff.heading("Description"), roff.code(text.strip("\n").splitlines())]


def _described(command: Command) -> list[str]:
    parts = [roff.heading("Synopsis"), roff.inline(command.usage) + "\n", roff.heading("Description"), _paragraph(command.description), _paragraph(command.epilog)]
    parts += [roff.heading("Options"), *(_option(option) for option in command.options)]
    if command.verbs:
        parts += [roff.heading("Verbs"), *(_verb(verb) for top in command.verbs for verb in top.walk())]
    return parts


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
