"""What the configurations of the instances want, whether their ports are free, and whether their sources answer."""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllmd import configured, stages
from vllmd.config.paths import Paths
from vllmd.config.settings import Model
from vllmd.core.model import ModelRequest
from vllmd.ctl import unit as units
from vllmd.ctl.doctor.facts import Failure, InstanceFacts, PortFacts, SourceFacts
from vllmd.ctl.doctor.gather_places import CREDENTIAL_PREFIX, CREDSTORES, supervisors
from vllmd.errors import VllmdError
from vllmd.models.inuse import Flocks

_NAMES = ("hf-token", "s3-credentials")
"""Credentials that all instances share, as the unit loads them."""
_PORTS_TRIED = 1000


def look(paths: Paths, names: Sequence[str]) -> tuple[InstanceFacts, ...]:
    return tuple(_instance(paths, name) for name in names if paths.instance_config(name).exists())


def _instance(paths: Paths, name: str) -> InstanceFacts:
    try:
        prepared = configured.prepare(name, paths, os.environ)
    except VllmdError as error:
        return InstanceFacts(name, failure(error))
    config = prepared.config
    request = configured.model_request(config, paths)
    facts = InstanceFacts(
        name,
        warnings=prepared.loaded.warnings,
        files=tuple(map(str, prepared.loaded.files)),
        endpoints=((config.serve.host, config.serve.port),) if config.serve.listen == "tcp" else (),
        store=str(request.store),
        is_selected=request.selected,
        wants_gpu=config.gpus not in ("none", 0, ()) and not config.preflight.skip_gpu_check,
    )
    return _with_plan(prepared, facts) if request.selected else facts


def _with_plan(prepared: configured.Prepared, facts: InstanceFacts) -> InstanceFacts:
    from vllmd.models.whereabouts import whereabouts

    config = prepared.config
    request = configured.model_request(config, prepared.paths)
    where = whereabouts(request, config.model, prepared.environ)
    network = _network(request, config.model) if "download" in where or "asked of" in where else ()
    facts = dataclasses.replace(facts, is_here=not where.startswith("not here"), network=network)
    try:
        plan = stages.plan(prepared, stages.context(prepared))
    except VllmdError as error:
        return dataclasses.replace(facts, failure=failure(error))
    installed = plan.installed
    return dataclasses.replace(facts, warnings=plan.warnings, executable=installed.executable, cuda=installed.cuda, archs=installed.archs)


def failure(error: VllmdError) -> Failure:
    return Failure(error.code, error.what, error.hint, int(error.status))


def ports(paths: Paths, instances: Sequence[InstanceFacts]) -> tuple[PortFacts, ...]:
    taken = {port for each in instances for _, port in each.endpoints}
    running = set(supervisors(paths, Flocks.read()).values())
    return tuple(_port(each.name, host, port, taken, by_hand=paths.scope != "system" and each.name in running) for each in instances for host, port in each.endpoints)


def _port(name: str, host: str, port: int, taken: set[int], *, by_hand: bool) -> PortFacts:
    """`by_hand`: the instance runs, and has no unit that would tell its listener from others."""
    from vllmd.preflight import ports as probe
    from vllmd.preflight.attribution import attribute

    try:
        verdict, listeners = probe.look(host, port)
    except VllmdError:
        return PortFacts(name, host, port, "unavailable")
    claims = attribute(listeners)
    if verdict.is_free or not claims:
        return PortFacts(name, host, port, verdict.value, free=_free(host, port, taken))
    first = claims[0]
    pids = tuple(each.pid for claim in claims for each in claim.holders)
    comm = first.holders[0].comm if first.holders else ""
    unit = first.listener.unit
    return PortFacts(name, host, port, verdict.value, unit, pids, comm, by_hand or unit == units.unit(name), _free(host, port, taken))


def _free(host: str, port: int, taken: set[int]) -> int:
    """The next port that nobody has and nobody wants; 0 where none is found."""
    for number in range(max(port, 1023) + 1, min(port + _PORTS_TRIED, 65535)):
        if number in taken:
            continue
        try:
            with socket.create_server((host, number)):
                taken.add(number)
                return number
        except OSError:
            continue
    return 0


@contextmanager
def credentials(paths: Paths) -> Iterator[str]:
    """A directory as systemd gives it to the unit: made of links, since this process may read what they lead to, or may not."""
    with tempfile.TemporaryDirectory(prefix="vllmd-doctor-") as folder:
        for name in _NAMES if paths.scope == "system" else ():
            for store in CREDSTORES:
                if os.access(store / f"{CREDENTIAL_PREFIX}{name}", os.R_OK):
                    Path(folder, name).symlink_to(store / f"{CREDENTIAL_PREFIX}{name}")
                    break
        yield folder


def source(paths: Paths, name: str, which: str, environ: Mapping[str, str]) -> SourceFacts:
    """Asks one network source for the model, as a start would. Lists it at most: nothing is fetched."""
    from vllmd.models import sources
    from vllmd.models.sources import Context, NotFound, Skipped

    os.environ.update(environ)  # botocore reads the process's own; this is a child
    prepared = configured.prepare(name, paths, os.environ)
    request = configured.model_request(prepared.config, paths)
    try:
        found = sources.get(which).find(request, Context(prepared.config.model, os.environ))
    except VllmdError as error:
        return SourceFacts(name, which, "failed", failure=failure(error))
    except OSError as error:
        return SourceFacts(name, which, "failed", failure=Failure("source_unreachable", f"{which}: {error}"))
    if isinstance(found, NotFound | Skipped):
        return SourceFacts(name, which, "not_found" if isinstance(found, NotFound) else "skipped", found.reason)
    return SourceFacts(name, which, "offered")


def _network(request: ModelRequest, model: Model) -> tuple[str, ...]:
    """Those that a start would ask; () where it is told to ask none."""
    from vllmd.models import sources

    if model.offline or request.path or not request.selected:
        return ()
    return tuple(each for each in request.sources if each in sources.NETWORK and (each != "r2" or model.r2_bucket))
