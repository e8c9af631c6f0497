"""`vllmctl model presets|set|show|clear|plan`: which model an instance serves, chosen for the hardware of this host."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vllmd.commandline import Parser
from vllmd.config.paths import Paths
from vllmd.errors import UsageError

_DESCRIPTION = "Which model an instance serves. A preset knows its form for each kind of GPU, its flags, and the context that the memory allows."
_SET = (
    "Writes NAME.d/50-model.yaml, and restarts the instance where it runs. Without PRESET|MODEL the last choice is made again, for the hardware of now. "
    "An instance that has no file yet gets one. Nothing is written that `vllmd check` would refuse."
)
_PLAN = "vllmd.ctl.model_plan"
_FLAGS = "What stands behind `--` are flags of vLLM: vllmctl model set qwen3 Qwen/Qwen3-8B -- --max-model-len 8192 --enforce-eager"


def main(argv: Sequence[str], paths: Paths) -> int:
    """Performs one command line; raises VllmdError."""
    if argv[:1] == ["plan"] and find_spec(_PLAN):
        return int(import_module(_PLAN).main(argv[1:], paths))
    own, flags = _split(argv)
    options = _parser().parse_args(own)
    if flags and options.verb != "set":
        raise UsageError("usage", f"model {options.verb} takes no flags of the engine", "vllmctl model set --help")
    match options.verb:
        case "presets":
            from vllmd.ctl import model_presets

            return model_presets.presets(paths, options.name, as_json=options.json)
        case "set":
            from vllmd.ctl import model_set

            asked = model_set.Asked(options.choice, tuple(flags), options.gpus, is_forced=options.force, is_new=options.new)
            return model_set.set_model(paths, options.name, asked, restarts=not options.no_restart, as_json=options.json)
        case "show":
            from vllmd.ctl import model_show

            return model_show.show(paths, options.name, as_json=options.json)
        case _:
            from vllmd.ctl import model_show

            return model_show.clear(paths, options.name, restarts=not options.no_restart, as_json=options.json)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl model", description=_DESCRIPTION)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    shown = _verb(verbs, "presets", "what fits this host, and what does not and why", epilog="Exit status: 0 something fits, 3 nothing does, 69 the GPU driver does not answer.")
    shown.add_argument("name", metavar="NAME", nargs="?", help="for the GPUs that this instance may use")
    chosen = _verb(verbs, "set", "choose a preset, or any model, for an instance", text=_SET, epilog=_FLAGS)
    chosen.add_argument("name", metavar="NAME", help="the instance")
    chosen.add_argument("choice", metavar="PRESET|MODEL", nargs="?", default="", help="a preset, a hub id ORG/NAME or ORG/NAME@REVISION, or a directory")
    chosen.add_argument("--gpus", metavar="N", type=_count, help="use exactly this many GPUs (default: the fewest that give the longest context)")
    chosen.add_argument("--force", action="store_true", help="although it does not fit")
    chosen.add_argument("--new", action="store_true", help="make the instance, although another one has nearly that name")
    shown = _verb(verbs, "show", "what was chosen, and what is in force")
    shown.add_argument("name", metavar="NAME", help="the instance")
    clear = _verb(verbs, "clear", "select no model: the unit stays up and serves nothing")
    clear.add_argument("name", metavar="NAME", help="the instance")
    if find_spec(_PLAN):
        verbs.add_parser("plan", help="what a model would need, before it is downloaded", add_help=False)
    for each in (chosen, clear):
        each.add_argument("--no-restart", action="store_true", help="only write the file")
    return top


def _verb(verbs: argparse._SubParsersAction[Parser], word: str, brief: str, *, text: str = "", **more: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(word, help=brief, description=text or brief.capitalize() + ".", **more)
    verb.add_argument("--json", action="store_true", help="one JSON object, for programs")
    return verb


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs from 1 to 64")
    return int(text)
