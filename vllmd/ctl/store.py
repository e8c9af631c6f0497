"""`vllmctl store`: what lies in the model store of this host, and what may be done with it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.commandline import Parser
from vllmd.config.paths import Paths
from vllmd.config.settings import Model
from vllmd.errors import PermissionMissing

_DESCRIPTION = "What lies in the model store of this host: models that were fetched, hub caches, directories of your own."
_IDS = "as `vllmctl store list` shows it: an id, an id with its @revision, or the name in the store"


@dataclass(frozen=True, slots=True)
class Place:
    """The store, and what the host's configuration says of models."""

    paths: Paths
    store: Path
    settings: Model


def main(argv: Sequence[str], paths: Paths) -> int:
    """Performs one command line; raises VllmdError."""
    arguments = _parser().parse_args(argv)
    return _perform(arguments, place_of(paths, arguments.dir, os.environ))


def place_of(paths: Paths, given: str | None, environ: Mapping[str, str]) -> Place:
    """--dir, else model.dir of the host's configuration, else where models lie by default."""
    from vllmd.config import layers
    from vllmd.engines import registry

    def tuning_for(name: str) -> type[Any]:
        return registry.get(name).tuning

    try:
        settings = layers.load(paths, None, environ, {}, tuning_for, require_file=False).config.model
    except PermissionMissing as error:
        if given is None:
            error.hint = "Run it as root (sudo vllmctl store ...), or say which store: --dir DIR"
            raise
        settings = Model()
    return Place(paths, Path(os.path.abspath(given or settings.dir or paths.models)), settings)  # noqa: PTH100 - resolve() would follow a link


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl store", description=_DESCRIPTION)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    common = Parser(add_help=False)
    common.add_argument("--dir", metavar="DIR", help="the store (default: model.dir of vllmd.yaml, else vllmd's own)")

    def add(verb: str, text: str, **more: Any) -> argparse.ArgumentParser:
        return verbs.add_parser(verb, help=text, description=text.capitalize() + ".", parents=[common], **more)

    shown = add("list", "show what is there: sizes, who uses it, when it was used last")
    shown.add_argument("--json", action="store_true", help="one JSON object, for programs")
    verify = add("verify", "read every byte and compare it with the sums", epilog="Exit status: 0 all is right, 65 something is not.")
    verify.add_argument("ids", metavar="ID", nargs="*", help=_IDS)
    verify.add_argument("--all", action="store_true", help="everything that sums speak for, as without an ID")
    _add_remove(add("rm", "remove a model; never one in use, nor a directory of your own"))
    collect = add("gc", "remove old versions, abandoned downloads and what interrupted removals left")
    collect.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    collect.add_argument("--keep", metavar="N", type=_count, help="versions of each model that stay (default: model.keep)")
    for verb, text in (("pin", "keep a version, whatever is fetched after it"), ("unpin", "let a version go when it is old")):
        chosen = add(verb, text)
        chosen.add_argument("id", metavar="ID", help=_IDS)
        chosen.add_argument("--version", metavar="SHA", help="the version, as list shows it (default: the current one)")
    _add_moves(add("export", "write a model as one tar file, for a machine without a network"), add("import", "take a model from such a tar file, verified byte by byte"))
    return top


def _add_remove(remove: argparse.ArgumentParser) -> None:
    remove.add_argument("ids", metavar="ID", nargs="+", help=_IDS)
    remove.add_argument("--version", metavar="SHA", help="only this version, as list shows it")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    remove.add_argument("--force", action="store_true", help="also what is pinned")


def _add_moves(export: argparse.ArgumentParser, take: argparse.ArgumentParser) -> None:
    export.add_argument("id", metavar="ID", help=_IDS)
    export.add_argument("-o", "--output", metavar="FILE", default="-", help="where to write it; - is standard output (the default)")
    export.add_argument("--version", metavar="SHA", help="the version, as list shows it (default: the current one)")
    export.add_argument("--as", dest="identity", metavar="ID[@REVISION]", help="the model that it is for those who import it (default: what it is here)")
    take.add_argument("file", metavar="FILE", help="the tar file; - is standard input")
    take.add_argument("--version", metavar="SHA", help="import only this version, as `export` says it")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _perform(arguments: argparse.Namespace, place: Place) -> int:
    match arguments.verb:
        case "list":
            from vllmd.ctl import store_list

            return store_list.show(place, as_json=arguments.json)
        case "verify":
            from vllmd.ctl import store_verify

            return store_verify.verify(place, arguments.ids, everything=arguments.all)
        case "rm":
            from vllmd.ctl import store_remove

            return store_remove.remove(place, arguments.ids, arguments.version, is_confirmed=arguments.yes, is_forced=arguments.force)
        case "gc":
            from vllmd.ctl import store_gc

            return store_gc.collect(place, arguments.keep or place.settings.keep, is_dry=arguments.dry_run)
        case "pin" | "unpin":
            from vllmd.ctl import store_pin

            act = store_pin.pin if arguments.verb == "pin" else store_pin.unpin
            return act(place, arguments.id, arguments.version)
        case "export":
            from vllmd.ctl import store_move

            return store_move.export(place, arguments.id, arguments.version, arguments.output, arguments.identity)
        case _:
            from vllmd.ctl import store_move

            return store_move.take(place, arguments.file, arguments.version)
