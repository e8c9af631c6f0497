"""Facts of a model and of this host, put together: what is needed, where, and whether it is there. For people, before a start.

The host's GPU service knows the GPUs; where it does not run, only a command that has the time asks the driver by a child.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vllmd.config.paths import Paths
from vllmd.config.settings import Model
from vllmd.core import architecture
from vllmd.core import weights as shares
from vllmd.core.architecture import SIZES
from vllmd.core.model import ModelRequest
from vllmd.core.sizing import Estimate, Wanted, dtype_of, estimate
from vllmd.core.sizing_verdict import Case, Device, Verdict, judge
from vllmd.errors import VllmdError
from vllmd.gpu import ask
from vllmd.models import headers, whereabouts
from vllmd.models.headers import Facts
from vllmd.system.files import read_below, read_small

QUICK_HEADER_BYTES = 1 << 20
"""More is not read for `vllmd check`: each MiB of headers takes 60 ms."""
SERVICE_S = 0.1
_MIB, _KIB = 1 << 20, 1 << 10
_ONLINE = {"fp8": 8, "bitsandbytes": 5}
"""Bits of an element that is quantised while it is loaded, with the scales."""


class Sized(NamedTuple):
    """What was found out. `gpus`: how many GPUs like the device there are."""

    facts: Facts
    model: architecture.Architecture
    estimate: Estimate
    verdict: Verdict
    device: Device | None
    gpus: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.facts.notes, *self.model.notes)


def size_up(facts: Facts, wanted: Wanted, device: Device | None, gpus: int = 0) -> Sized:
    """Pure."""
    model = architecture.corrected(architecture.parse(facts.config), shares.key_rows(facts.tensors))
    found = shares.common_float(facts.tensors)
    used = dtype_of(model, wanted, found)
    if facts.tensors:
        held = shares.count(facts.tensors, model, SIZES[used], 0 if model.quantization else _ONLINE.get(wanted.online, 0))
    else:
        scale = 1.0 if model.quantization or not model.dtype else SIZES[used] / SIZES[model.dtype]
        held = shares.of_files(round(facts.file_bytes * scale), model)
    case = Case(model, held, wanted, found)
    needs = estimate(model, held, wanted, found)
    return Sized(facts, model, needs, judge(case, needs, device, gpus), device, gpus)


def devices(document: Mapping[str, Any], chosen: Sequence[str] = ()) -> list[Device]:
    """The GPUs of a host's GPU document, or those of them that are chosen: by UUID, its beginning, or index; a MIG device by its UUID.
    A GPU whose memory is the host's (it tells none) has that."""
    found: list[tuple[str, str, Device]] = []
    for gpu in document.get("gpus") or ():
        if not isinstance(gpu, dict) or gpu.get("lost"):
            continue
        name = _word(gpu.get("name")) or "GPU"
        found.append((str(gpu.get("index", "")), _word(gpu.get("uuid")), _device(f"GPU {gpu.get('index', '?')} {name}", gpu)))
        slices = gpu.get("mig")
        for part in slices if isinstance(slices, list) else ():
            if isinstance(part, dict) and part.get("uuid"):
                found.append(("", _word(part["uuid"]), _device(f"a MIG device of GPU {gpu.get('index', '?')} {name}", part)))
    if not chosen:
        return [device for index, _, device in found if index]
    return [device for index, uuid, device in found if any(each == index or (len(each) > 4 and uuid.startswith(each)) for each in chosen)]


def _device(name: str, words: Mapping[str, Any]) -> Device:
    total, free = _number(words.get("memory_total_mib")), _number(words.get("memory_free_mib"))
    return Device(name, total * _MIB, free * _MIB if free or total else -1) if total else host_memory(f"{name} (the host's memory)", is_cpu=False)


def host_memory(name: str = "this host", *, is_cpu: bool = True, proc: Path = Path("/proc"), system: Path = Path("/sys")) -> Device:
    """`is_cpu`: as vLLM's CPU build reckons it: the first NUMA node's, since each of its workers keeps to one, and no more than the
    control group may have."""
    words = _meminfo(proc / "meminfo")
    total, free = words.get("MemTotal", 0) * _KIB, words["MemAvailable"] * _KIB if "MemAvailable" in words else -1
    if not is_cpu:
        return Device(name, total, free)
    nodes = sorted((system / "devices/system/node").glob("node[0-9]*/meminfo"), key=lambda path: int(path.parent.name[4:]))
    node = next((found for path in nodes if (found := _meminfo(path, 2)).get("MemTotal")), {})
    if node.keys() >= _FREE:
        name = name if len(nodes) == 1 else f"a NUMA node of {name}"
        total, free = node["MemTotal"] * _KIB, sum(node[word] for word in _FREE) * _KIB
    limit, used = _of_group(system / "fs/cgroup")
    if 0 < limit < total:
        return Device(f"{name} (its control group)", limit, max(0, min(free, limit - used)), is_cpu=True)
    return Device(name, total, free, is_cpu=True)


_FREE = frozenset({"MemFree", "Active(file)", "Inactive(file)", "SReclaimable"})


def _of_group(folder: Path) -> tuple[int, int]:
    """(limit, used) in bytes: what a container's own group says at the root of what it sees. 0: no limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        words = [_text(folder / name).strip() for name in (limit, used)]
        if words[0].isdigit():
            return int(words[0]), int(words[1]) if words[1].isdigit() else 0
    return 0, 0


def _meminfo(path: Path, skipped: int = 0) -> dict[str, int]:
    """KiB by name; a node's file has two words before each name."""
    rows = [line.replace(":", " ").split()[skipped:] for line in _text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return read_small(path, 1 << 16).decode("ascii", "replace")
    except OSError:
        return ""


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40 else 0


def _word(value: object) -> str:
    return "".join(char if char.isprintable() else "?" for char in str(value or "")[:128])


# -- an instance, in no time


class Instance(NamedTuple):
    """What of an instance decides: where its model may lie, which GPUs it may have, how it is to be served."""

    name: str
    paths: Paths
    request: ModelRequest
    settings: Model
    environ: Mapping[str, str]
    gpus: str | int | tuple[str, ...]
    wanted: Wanted


def of_instance(asked: Instance) -> Sized | str:
    """For `vllmd check`: nothing is fetched, no driver is asked. A sentence where it cannot be told."""
    directory = whereabouts.directory(asked.request, asked.settings, asked.environ)
    if directory is None:
        return f"the model is not on this host, and nothing is fetched for this: `vllmctl model plan {asked.request.identity}` reads its headers where it lies"
    try:
        facts = headers.local(directory, QUICK_HEADER_BYTES)
    except (VllmdError, OSError) as error:
        return f"cannot be told: {getattr(error, 'what', error)}"
    return of_facts(asked, facts)


def of_facts(asked: Instance, facts: Facts, known: Device | None = None, gpus: int = 0) -> Sized:
    """`known`: a GPU like those it will have, and how many there are of them; without it, the host's service is asked."""
    if asked.wanted.is_cpu:
        device = host_memory()
        return size_up(facts, asked.wanted, replace(device, free=-1) if _runs(asked) else device)
    if known is not None:
        return size_up(facts, replace(asked.wanted, gpu_bytes=known.total), known, gpus)
    document = ask.ask(asked.paths, SERVICE_S)
    found = _chosen(devices(document or {}, _names(asked.gpus)), asked.gpus, asked.wanted.gpus)
    if found is None:
        return size_up(facts, asked.wanted, None)
    device = replace(found, free=-1) if _runs(asked) else found
    return size_up(facts, replace(asked.wanted, gpu_bytes=device.total), device, len(devices(document or {})))


def smallest(found: Sequence[Device], count: int) -> Device | None:
    """Of the `count` largest the one with the least memory, and the least of what is free: every GPU gets the same share of the model."""
    best = sorted(found, key=lambda device: -device.total)[: max(count, 1)]
    if not best:
        return None
    least = min(best, key=lambda device: device.total)
    return replace(least, free=min(device.free for device in best))


def _chosen(found: Sequence[Device], gpus: str | int | tuple[str, ...], count: int) -> Device | None:
    return smallest(found, len(found) if isinstance(gpus, tuple) else count)


def _names(gpus: str | int | tuple[str, ...]) -> tuple[str, ...]:
    return gpus if isinstance(gpus, tuple) else ()


def _runs(asked: Instance) -> bool:
    """What it has now is not missing for itself."""
    try:
        pid = json.loads(read_below(asked.paths.runtime, ("i", asked.name, "status.json"), 1 << 20)).get("pid")
    except (OSError, ValueError, RecursionError, AttributeError):
        return False
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()
