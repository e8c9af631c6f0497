"""`vllmctl model plan MODEL`: what a model would need on this host, from its headers alone. No weights are fetched.

Directories and stores of this host are read where they lie; of a model that is elsewhere, pieces of its files are asked for: a few MB
even of the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from vllmd.commandline import Parser
from vllmd.config.paths import Paths

if TYPE_CHECKING:
    from vllmd.config.settings import Model
    from vllmd.core.model import ModelRequest
    from vllmd.core.sizing import Wanted
    from vllmd.core.sizing_verdict import Device
    from vllmd.ctl.store import Place
    from vllmd.models.headers import Facts
    from vllmd.models.sources import Offered
    from vllmd.preflight.sizing import Sized

DOES_NOT_FIT = 3
DRIVER_TIMEOUT_S, ANSWER_S = 45.0, 120.0
_GIB = 1 << 30
_MOST_GPUS, _MOST_GIB = 4096, 1 << 20
_DESCRIPTION = (
    "How much memory a model needs here, before it is downloaded: weights, KV cache, and what comes on top, on each GPU; and what to change if it does "
    "not fit. Only the headers of its files are read."
)
_STATUSES = "Exit status: 0 it fits, or there is nothing to compare with; 3 it does not fit; 66 no source has it."


def main(argv: Sequence[str], paths: Paths) -> int:
    """Performs one command line, without the words `model plan`; raises VllmdError."""
    arguments = _parser().parse_args(argv)
    from vllmd.ctl import store

    request, settings = _asked(arguments, store.place_of(paths, arguments.dir, os.environ))
    try:
        with _within(ANSWER_S):
            found, via = facts(request, settings, os.environ)
    except _TooLong:
        from vllmd.errors import SourceUnavailable

        what = f"what {request.identity} needs could not be read within {ANSWER_S:g} s: a source answers, but too slowly"
        raise SourceUnavailable("source_slow", what, f"ask another one with --source; {paths.vllmctl} doctor asks each") from None
    sized = _sized(found, arguments, paths)
    if arguments.json:
        from vllmd.preflight.sizing_show import as_dict

        sys.stdout.write(json.dumps({"schema": 1, "model": request.identity, "via": via, "sizing": as_dict(sized)}) + "\n")
    else:
        from vllmd.config.values import printable

        sys.stdout.write("".join(f"{printable(line)}\n" for line in _screen(request, via, sized)))
    return DOES_NOT_FIT if sized.verdict.word in ("too_long", "too_large", "busy") else 0


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="vllmctl model plan", description=_DESCRIPTION, epilog=_STATUSES)
    top.add_argument("model", metavar="MODEL", help="ORG/NAME[@REVISION], a name in the store, or a directory")
    top.add_argument("--gpus", metavar="N", type=_gpus, help="share it out among N GPUs (default: 1)")
    top.add_argument("--pipeline", metavar="N", type=_gpus, default=1, help="in N stages, each of which has its part of the GPUs")
    top.add_argument("--max-model-len", metavar="N", type=_count, help="the longest request, prompt and answer (default: what the model can)")
    top.add_argument("--kv-cache-dtype", metavar="TYPE", default="", help="of the KV cache: auto, fp8, ...")
    top.add_argument("--dtype", metavar="TYPE", default="", help="of weights that are not quantised: auto, bfloat16, float32, ...")
    top.add_argument("--gpu-memory-utilization", metavar="SHARE", type=_share, default=0.92, help="of each GPU's memory (default: 0.92, vLLM's own)")
    top.add_argument("--gpu-memory", metavar="GIB", type=_gib, help="plan for GPUs of this size, whatever this host has")
    top.add_argument("--cpu", action="store_true", help="plan for this host's processors")
    top.add_argument("--source", metavar="NAME", action="append", help="ask only this source (local, hf-cache, r2, hf-hub, ...); may be repeated")
    top.add_argument("--dir", metavar="DIR", help="the store (default: model.dir of vllmd.yaml, else vllmd's own)")
    top.add_argument("--json", action="store_true", help="one JSON object, for programs")
    return top


def _count(text: str, most: int = 1 << 40) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18 or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number from 1 to {most}")
    return int(text)


def _gpus(text: str) -> int:
    return _count(text, _MOST_GPUS)


def _share(text: str) -> float:
    return _number(text, 1)


def _gib(text: str) -> float:
    return _number(text, _MOST_GIB)


def _number(text: str, most: float) -> float:
    """nan is greater and less than nothing."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number above 0 and at most {most:g}")
    return value


# -- the model


class _TooLong(BaseException):
    """No Exception: a source's library would try again."""


@contextmanager
def _within(limit_s: float) -> Iterator[None]:
    """Each read has a limit of its own; a server that sends a byte now and then keeps within it for ever."""

    def give_up(*_: object) -> NoReturn:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _asked(arguments: argparse.Namespace, place: Place) -> tuple[ModelRequest, Model]:
    from vllmd.ctl.model_places import absolute
    from vllmd.errors import UsageError
    from vllmd.models import sources
    from vllmd.models.identity import request_from

    name, _, revision = arguments.model.partition("@")
    given = replace(place.settings, name="", id="", org="", path="", revision=revision or "", dir=str(place.store))
    if unknown := set(arguments.source or ()) - set(sources.names()):
        raise UsageError("usage", f"there is no source {sorted(unknown)[0]!r}", f"there are: {', '.join(sources.names())}")
    if arguments.source:
        given = replace(given, sources=tuple(arguments.source))
    if arguments.model.startswith(("/", "./", "../", "~")) or os.path.isfile(f"{arguments.model}/config.json"):  # noqa: PTH113 - pathlib's raises for a long name
        given = replace(given, path=os.path.realpath(absolute(arguments.model)), revision="")
    elif "/" in name:
        given = replace(given, id=name)
    else:
        given = replace(given, name=name)
    return request_from(given, place.store), given


def facts(request: ModelRequest, settings: Model, environ: Mapping[str, str]) -> tuple[Facts, str]:
    """Of the first source that has it, and which that is. Errors as a resolution has them."""
    from vllmd.errors import ModelNotFound, VllmdError
    from vllmd.models import headers, sources
    from vllmd.models.ioerrors import translated
    from vllmd.models.sources import Context, Found
    from vllmd.models.sources import Offered as Remote

    reasons: list[str] = []
    worst: VllmdError | None = None
    for name in ("local",) if request.path else request.sources:
        try:
            finding = sources.get(name).find(request, Context(settings, environ))
            if isinstance(finding, Remote):
                return headers.remote(_selected(finding, settings), environ), name
            if isinstance(finding, Found):
                return headers.local(finding.candidates[0].directory), name
            reasons.append(f"{name}: {finding.reason}")
        except OSError as error:
            worst = worst or translated(error, f"look into {name}")
            reasons.append(f"{name}: {error.strerror}")
        except VllmdError as error:
            worst = worst or error
            reasons.append(f"{name}: {error.what}")
    what = f"no source has {request.identity}: {'; '.join(reasons)}"
    if worst is not None:
        raise type(worst)(worst.code, what, worst.hint)
    raise ModelNotFound("model_not_found", what, "Give it as ORG/NAME, or the directory that holds config.json.")


def _selected(offered: Offered, settings: Model) -> Offered:
    """A listing is hostile input here too."""
    from vllmd.models.listing import checked, selected

    return replace(offered, listing=selected(checked(offered.listing), settings.exclude))


# -- the host


@dataclass(frozen=True, slots=True)
class _Place:
    """Where it is planned for: the device, and how many of them there are."""

    device: Device | None
    count: int


def _sized(facts: Facts, arguments: argparse.Namespace, paths: Paths) -> Sized:
    from vllmd.preflight.sizing import size_up

    place = _place(arguments, paths)
    wanted = _wanted(arguments, place)
    return size_up(facts, wanted, place.device, place.count)


def _wanted(arguments: argparse.Namespace, place: _Place) -> Wanted:
    from vllmd.core.sizing import Wanted

    device = place.device
    gpus, stages = arguments.gpus or 1, min(arguments.pipeline, arguments.gpus or arguments.pipeline)
    is_cpu = device is not None and device.is_cpu
    return Wanted(
        tensor_parallel=max(gpus // stages, 1),
        pipeline_parallel=stages,
        max_model_len=arguments.max_model_len or 0,
        dtype=arguments.dtype,
        kv_dtype=arguments.kv_cache_dtype,
        fraction=arguments.gpu_memory_utilization,
        is_cpu=is_cpu,
        gpu_bytes=device.total if device is not None and not is_cpu else 0,
    )


def _place(arguments: argparse.Namespace, paths: Paths) -> _Place:
    """The GPUs that the host's service or the driver tells of; without any, the processors."""
    from vllmd.core.sizing_verdict import Device
    from vllmd.preflight import sizing

    if arguments.gpu_memory is not None:
        return _Place(Device(f"a GPU of {arguments.gpu_memory:g} GiB", int(arguments.gpu_memory * _GIB)), 0)
    if arguments.cpu:
        return _Place(sizing.host_memory(), 1)
    from vllmd.gpu import client

    found = sizing.devices(client.read_once(paths, DRIVER_TIMEOUT_S))
    if found:
        return _Place(sizing.smallest(found, arguments.gpus or 1), len(found))
    return _Place(None, 0) if arguments.gpus else _Place(sizing.host_memory(), 1)


# -- for people


def _screen(request: ModelRequest, via: str, sized: Sized) -> Iterator[str]:
    from vllmd.core.sizing_verdict import gib
    from vllmd.preflight import sizing_show

    facts, model = sized.facts, sized.model
    revision = f" at {facts.revision[:12]}" if facts.revision else ""
    where = f"{via}: {gib(facts.read_bytes)} read of {gib(facts.file_bytes)} of weights"
    yield f"{request.identity}{revision} ({where})"
    facts_of = [model.name or model.family, sized.estimate.dtype, f"quantised ({model.quantization})" if model.quantization else ""]
    facts_of += [f"{len(model.layers)} layers", f"context up to {model.context} tokens" if model.context else ""]
    yield f"  {', '.join(filter(None, facts_of))}"
    for label, value in sizing_show.rows(sized):
        yield f"  {label:<9} {value}"
    for note in sized.notes:
        yield f"  note      {note}"
    yield from sizing_show.verdict(sized)
