"""doctor, whole: everything is looked at at once, each by a child under a deadline, and then judged."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vllmd.config.paths import Paths
from vllmd.ctl import files
from vllmd.ctl import unit as units
from vllmd.ctl.doctor import (
    checks_gpus,
    checks_host,
    checks_instances,
    checks_places,
    checks_units,
    gather_gpus,
    gather_host,
    gather_inside,
    gather_instances,
    gather_places,
    gather_units,
)
from vllmd.ctl.doctor.facts import Failure, HostFacts, InstanceFacts, SourceFacts, SystemdFacts
from vllmd.ctl.doctor.finding import Finding, Unseen
from vllmd.ctl.doctor.jobs import Job, Outcome
from vllmd.ctl.files import Problem
from vllmd.errors import UsageError

T = TypeVar("T")
FIRST_S = 10.0
"""What everything else waits for."""
SOURCE_S = 15.0
_INSIDES = 8
"""More instances than this differ in nothing that a sandbox shows."""


@dataclass(frozen=True, slots=True)
class Report:
    """`findings` in the order in which they are to be mended."""

    findings: tuple[Finding, ...]
    unseen: tuple[Unseen, ...]
    instances: tuple[str, ...]
    took_s: float


class Examination:
    """One run. What could not be looked at is told in `unseen`."""

    def __init__(self, paths: Paths, given: Sequence[str], timeout_s: float) -> None:
        self._paths = paths
        self._given = tuple(map(units.instance_name, given))
        self._timeout_s = timeout_s
        self._since = time.monotonic()
        self._found: list[Finding] = []
        self._unseen: list[Unseen] = []

    def report(self) -> Report:
        paths, first = self._paths, min(FIRST_S, self._timeout_s)
        gpus = self._start(partial(gather_gpus.look, paths, self._timeout_s - 1), self._timeout_s)
        cuda = self._start(partial(gather_gpus.cuda, self._timeout_s - 1), self._timeout_s)
        host_job = self._start(partial(gather_host.look, paths), first)
        names_job = self._start(partial(_names, paths), first)
        names = self._chosen(self._value(names_job, "the names of the instances"))
        systemd_job = self._start(partial(gather_units.look, paths, names), first) if units.runs(paths.scope) else None
        instances = self._value(self._start(partial(gather_instances.look, paths, names), first), "the configurations") or ()
        systemd = self._value(systemd_job, "systemd") if systemd_job is not None else None
        if systemd is None and systemd_job is None:
            self._unseen.append(Unseen("the units", "instances under --root have none" if paths.scope == "root" else "systemd does not run here"))
        host = self._value(host_job, "the host") or HostFacts()
        self._judge(host, systemd, instances, gpus, cuda)
        return Report(tuple(self._found), tuple(dict.fromkeys(self._unseen)), tuple(names), time.monotonic() - self._since)

    def _judge(self, host: HostFacts, systemd: SystemdFacts | None, instances: Sequence[InstanceFacts], gpus: Job[Any], cuda: Job[Any]) -> None:
        paths = self._paths
        rest = self._rest_s()
        places = self._start(partial(gather_places.look, paths), min(FIRST_S, rest))
        disks = {place: self._start(partial(gather_places.disk, *place), min(FIRST_S, rest)) for place in _disks(paths, instances)}
        ports = self._start(partial(gather_instances.ports, paths, instances), min(FIRST_S, rest))
        insides = [(each, self._start(partial(gather_inside.look, *each), min(FIRST_S, rest))) for each in self._insides(host, systemd, instances)]
        with gather_instances.credentials(paths) as folder:
            asked = self._sources(instances, folder)
            self._add(checks_host.check(host, systemd))
            if systemd is not None:
                self._add(checks_units.check(systemd, paths.scope))
                self._add(checks_units.host_units(systemd, host) if paths.scope == "system" else ())
            if (found := self._value(places, "the directories")) is not None:
                self._add(checks_places.check(paths, found, host.service))
            self._add(self._disks(disks))
            if (seen := self._value(gpus, "the GPUs")) is not None:
                self._add(checks_gpus.check(host, seen, paths.vllmctl))
            self._add(checks_instances.configuration(instances, is_root=os.geteuid() == 0))
            if (ask := self._value(cuda, "CUDA")) is not None and not (seen and seen.stuck_in):
                self._add(checks_gpus.fits(instances, ask, self._timeout_s))
            for (_, name, *_), job in insides:
                if (within := self._value(job, f"the inside of vllmd@{name}.service")) is not None:
                    self._add(checks_instances.inside(within, host.service.user if host.service else "vllmd"))
            self._add(checks_instances.ports(self._value(ports, "the ports") or (), paths, host))
            answers = [_answer(name, which, job) for (name, which), job in asked]
            self._add(checks_instances.sources(answers, instances, paths, has_credentials=paths.scope != "system" or os.geteuid() == 0))
        if systemd is not None:
            problems = self._value(self._start(partial(_problems, paths, systemd.names), min(FIRST_S, self._rest_s())), "how instances ended")
            self._add(checks_units.starts(systemd, problems or {}, paths.vllmctl))

    def _disks(self, jobs: dict[tuple[str, Path], Job[Any]]) -> Iterator[Finding]:
        """One that does not answer keeps everybody waiting who touches it."""
        found = []
        for (_, path), job in jobs.items():
            outcome = job.outcome()
            if outcome.why:
                yield Finding("disk-silent", str(path), f"its file system cannot be asked: {outcome.why}", note="is its server or its disk there? journalctl -k -p warning; findmnt shows what is mounted")
            elif outcome.value is not None:
                found.append(outcome.value)
        yield from checks_places.disks(found, self._paths.vllmctl)

    def _sources(self, instances: Sequence[InstanceFacts], folder: str) -> list[tuple[tuple[str, str], Job[Any]]]:
        """The network, where an instance would ask it."""
        paths, jobs = self._paths, []
        for each in instances:
            for which in each.network:
                environ = {"CREDENTIALS_DIRECTORY": folder} if paths.scope == "system" else {}
                jobs.append(((each.name, which), self._start(partial(gather_instances.source, paths, each.name, which, environ), min(SOURCE_S, self._rest_s()))))
        return jobs

    def _insides(self, host: HostFacts, systemd: SystemdFacts | None, instances: Sequence[InstanceFacts]) -> Iterator[tuple[Any, ...]]:
        """One for each unit that differs from the others."""
        paths = self._paths
        if systemd is None and paths.scope != "root":
            return
        if paths.scope == "system" and os.geteuid() != 0:
            self._unseen.append(Unseen("devices, limits and directories from inside the units", "that takes root: sudo vllmctl doctor"))
            return
        known: set[object] = set()
        for each in instances:
            unit = systemd.units.get(units.unit(each.name)) if systemd is not None else None
            if systemd is not None and (unit is None or unit["LoadState"] != "loaded" or unit["DynamicUser"] == "yes"):
                continue
            wanted = _wanted(paths, host, each)
            key = (tuple(unit[key] for key in gather_units.COPIED) if unit else (), str(wanted))
            if key not in known and len(known) < _INSIDES:
                known.add(key)
                yield paths, each.name, unit, wanted

    def _chosen(self, known: tuple[str, ...] | None) -> tuple[str, ...]:
        """The instances that are meant; UsageError for one that nobody knows."""
        for name in self._given if known is not None else ():
            if name not in (known or ()):
                raise UsageError("instance_unknown", f"no instance {name}: {self._paths.instance_config(name)} does not exist", f"{self._paths.vllmctl} status lists what there is")
        return self._given or known or ()

    def _rest_s(self) -> float:
        return max(1.0, self._timeout_s - (time.monotonic() - self._since))

    def _start(self, look: Any, timeout_s: float) -> Job[Any]:
        return Job(look, timeout_s)

    def _value(self, job: Job[T], what: str) -> T | None:
        outcome: Outcome[T] = job.outcome()
        if outcome.why:
            self._unseen.append(Unseen(what, outcome.why))
        return outcome.value

    def _add(self, said: Iterable[Finding | Unseen]) -> None:
        for each in said:
            if isinstance(each, Unseen):
                self._unseen.append(each)
            elif each not in self._found:
                self._found.append(each)


def _answer(name: str, which: str, job: Job[SourceFacts]) -> SourceFacts:
    """Silence is an answer, too."""
    outcome = job.outcome()
    silence = Failure("source_unreachable", f"{which} for {name}: {outcome.why}", "Look at the network, and at the proxy's settings.")
    return outcome.value or SourceFacts(name, which, "failed", failure=silence)


def _names(paths: Paths) -> tuple[str, ...]:
    return tuple(sorted({*files.names(paths), *(gather_units.known(paths) if units.runs(paths.scope) else ())}))


def _problems(paths: Paths, names: Sequence[str]) -> dict[str, Problem | None]:
    """How each last ended."""
    return {name: files.problem(files.last(paths, name)) for name in names}


def _disks(paths: Paths, instances: Sequence[InstanceFacts]) -> list[tuple[str, Path]]:
    stores = dict.fromkeys(each.store for each in instances if each.store) or {str(paths.models): None}
    return [*(("store", Path(each)) for each in stores), ("state", paths.state), ("cache", paths.cache), ("runtime", paths.runtime)]


def _wanted(paths: Paths, host: HostFacts, each: InstanceFacts) -> dict[str, list[str]]:
    """What an engine of this instance needs."""
    writable = [str(path) for path in (paths.state, paths.instance_state(each.name), paths.cache, paths.locks, paths.gpus, paths.sockets)]
    if each.network and each.store:
        writable.append(each.store)
    readable = [*each.files, *filter(None, [each.executable])]
    return {"devices": list(host.devices) if each.wants_gpu else [], "readable": readable, "writable": writable}
