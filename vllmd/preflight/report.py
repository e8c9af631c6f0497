"""What preflight found: one value, the same object as JSON on success and on failure (schema 1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vllmd.errors import ConfigError, GpuUnavailable, PermissionMissing, PortRefused, Status, TryLater, VllmdError


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening (or bound) socket on a port that is wanted. `uid` is None and `pids` empty where it cannot be known;
    `cgroup` is the path in the unified hierarchy ('' unknown), `unit` the systemd unit that the path names. `state` is
    'listening', 'bound' (holds the port and does not listen: a vLLM that loads) or 'connected'. A unix socket has its
    path as address and port 0."""

    address: str
    port: int
    inode: int
    uid: int | None = None
    pids: tuple[int, ...] = ()
    cgroup: str = ""
    unit: str = ""
    state: str = "listening"

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}" if self.port else self.address


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as preflight saw it. Memory in MiB, temperature in °C, utilization in %; None where it does not say.
    `lost` is 'lost' or 'reset_required' where the driver says that the device is unusable."""

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
    driver_version: str = ""
    lost: str = ""
    warnings: tuple[str, ...] = ()


_ERRORS_OF_RUN: dict[str, type[VllmdError]] = {
    "gpu_hard_fail": GpuUnavailable,
    "gpu_memory_not_back": TryLater,
    "lock_held": TryLater,
    "host_exhausted": TryLater,
    "address_unavailable": TryLater,
    "port_not_permitted": PermissionMissing,
    "lock_refused": PermissionMissing,
}
"""What a reason with code 1 is under `vllmd run`; any other is a ConfigError."""


@dataclass(frozen=True, slots=True)
class Report:
    """`code` is the exit status, 0 to 5 (under `vllmd run` see as_error); `reason` '' on success.

    `action` keeps the words that today's parsers know: noop, would_stop (dry run), stopped; '' on failure before
    anything was decided. `reason` is one of: invalid_configuration, host_unresolvable, address_unavailable,
    port_not_permitted, bad_owner_regex, proc_unavailable, host_exhausted, lock_held, lock_refused, json_with_command,
    gpu_hard_fail, gpu_memory_not_back, socket_path_refused (code 1); port_owned_by_other_process, systemd_socket_activation,
    owned_by_instance (2); port_owned_by_other_uid (3); listener_unattributable (4); port_still_listening_after_stop,
    port_held_by_closed_connections (5).
    """

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
        """The JSON object: every key always there. `status` and `port` are for those who parse today's."""
        head = {"schema": 1, "status": "ok" if self.ok else "error", "port": self.ports[0] if self.ports else None}
        body = asdict(self) | {"cmdlines": {str(pid): text for pid, text in self.cmdlines.items()}}
        return head | body

    def as_error(self) -> VllmdError:
        """The failure as `vllmd run` raises it, with its exit statuses. Only for a report that is not ok."""
        if self.code in (2, 3, 4, 5):
            return PortRefused(self.reason, self.error, self.hint, status=Status(self.code))
        return _ERRORS_OF_RUN.get(self.reason, ConfigError)(self.reason, self.error, self.hint)
