"""The GPUs as they are now, for the gates around a launch: the probe child under a deadline, its lines as core's facts.

Without libcuda, whose start alone takes seconds on a big host: only NVML (else nvidia-smi), asked every half second while
memory comes back.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllmd.core.gpu_choice import Device, Process, Slice
from vllmd.preflight import child, gpu
from vllmd.system import cgroupnames, procfs


@dataclass(frozen=True, slots=True)
class Seen:
    """`source` 'skipped': there is no driver, and so no GPU that could be gated. `hung_in`: the stage that met the deadline."""

    devices: tuple[Device, ...] = ()
    source: str = "skipped"
    hung_in: str = ""
    note: str = ""


def look(timeout_s: float) -> Seen:
    """Blocks for the deadline at most. Owners of memory are named with their units."""
    outcome = _ask(timeout_s)
    return parse(outcome.output, timed_out=outcome.timed_out)


def document(timeout_s: float) -> dict[str, Any]:
    """The same for a person's eyes, as the host service would say it, as far as the probe knows."""
    outcome = _ask(timeout_s)
    seen = parse(outcome.output, timed_out=outcome.timed_out)
    rows = [line for line in gpu.objects(outcome.output) if isinstance(line.get("gpus"), list)]
    units = {process.pid: process.unit for device in seen.devices for process in device.processes}
    gpus = [dict(each) for line in rows for each in line["gpus"] if isinstance(each, dict)]
    for each in gpus:
        each["processes"] = [{**row, "unit": units.get(_number(row, "pid") or 0, "")} for row in _objects(each, "processes")]
    driver = next((str(line.get("driver_version", "")) for line in rows), "")
    source = "none" if seen.source == "skipped" else seen.source
    return {"schema": 1, "source": source, "driver_version": driver, "stuck_in": seen.hung_in, "note": seen.note, "gpus": gpus}


def _ask(timeout_s: float) -> child.Outcome:
    return child.run([sys.executable, "-P", "-m", "vllmd.gpu.probe", "--memory"], timeout_s=timeout_s, environ=gpu.child_environ())


def parse(output: str, *, timed_out: bool) -> Seen:
    """What makes no sense is passed over."""
    stage, done, source, note = "start", False, "skipped", ""
    devices: tuple[Device, ...] = ()
    for line in gpu.objects(output):
        stage, done = str(line.get("stage", stage)), done or bool(line.get("done"))
        if isinstance(found := line.get("gpus"), list):
            source = str(line.get("source"))
            devices = tuple(_device(each) for each in found if isinstance(each, dict))
        note = str(line.get("note") or note)[:200]
    return Seen(devices, source, stage if timed_out and not done else "", note)


def _device(words: Mapping[str, Any]) -> Device:
    return Device(
        index=_number(words, "index") or 0,
        uuid=_text(words, "uuid"),
        name=_text(words, "name"),
        memory_total_mib=_number(words, "memory_total_mib"),
        memory_free_mib=_number(words, "memory_free_mib"),
        utilization_pct=_number(words, "utilization_pct"),
        lost=_text(words, "lost"),
        processes=tuple(named(_number(each, "pid") or 0, _number(each, "used_mib")) for each in _objects(words, "processes")),
        slices=tuple(
            Slice(_text(each, "uuid"), _number(each, "memory_total_mib"), _number(each, "memory_free_mib")) for each in _objects(words, "mig")
        ),
    )


def named(pid: int, used_mib: int | None) -> Process:
    """With what /proc says of it: by its stat alone, since the command line of a process in a driver's D state can block."""
    found = procfs.stat(pid)
    name = found.comm if found and found.comm.isprintable() else ""
    return Process(pid, used_mib, name, cgroupnames.unit_of(procfs.cgroup(pid)))


def _objects(words: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = words.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _text(words: Mapping[str, Any], key: str) -> str:
    value = words.get(key)
    return value[:128] if isinstance(value, str) and value.isprintable() else ""


def _number(words: Mapping[str, Any], key: str) -> int | None:
    value = words.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
