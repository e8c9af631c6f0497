"""What preflight found: one value, the same object as JSON on success and on failure (schema 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening (or bound) socket on a port that is wanted. `uid` is None and `pids` empty where it cannot be known;
    `cgroup` is the path in the unified hierarchy ('' unknown), `unit` the systemd unit that the path names."""

    address: str
    port: int
    inode: int
    uid: int | None = None
    pids: tuple[int, ...] = ()
    cgroup: str = ""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as preflight saw it. Memory in MiB, temperature in °C, utilization in %; None where it does not say."""

    index: int
    name: str = ""
    uuid: str = ""
    memory_total_mib: int | None = None
    memory_free_mib: int | None = None
    temperature_c: int | None = None
    utilization_pct: int | None = None
    pstate: int | None = None
    clocks_event_reasons_active: str = ""
    compute_capability: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """`code` is the exit status, 0 to 5 (under `vllmd run` a GPU's failure is 69); `reason` '' on success;
    `action` one of clear, would-stop, stopped, '' (today's noop is `status` ok with action clear)."""

    ok: bool
    code: int
    host: str
    ports: tuple[int, ...]
    action: str = ""
    reason: str = ""
    error: str = ""
    hint: str = ""
    dry_run: bool = False
    pids: tuple[int, ...] = ()
    units: tuple[str, ...] = ()
    uids: tuple[int, ...] = ()
    cmdlines: dict[int, str] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    gpu_check_source: str = "skipped"
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        raise NotImplementedError
