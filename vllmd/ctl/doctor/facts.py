"""What doctor looks at, as plain values: each check decides on these alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllmd.system.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Service:
    """The account that instances run as."""

    user: str
    uid: int
    gids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Clock:
    """`unsynchronised` None: not known. `newest`: (path, time of its last change) of the youngest of our files. `built_at`:
    when this program was made."""

    now: float = 0.0
    unsynchronised: bool | None = None
    has_ntp: bool = True
    newest: tuple[str, float] = ("", 0.0)
    built_at: float = 0.0


@dataclass(frozen=True, slots=True)
class HostFacts:
    """`container`: what systemd calls it, '' on a real host. `storage`: journald's setting. `devices`: the nodes of GPUs;
    `missing_devices`: those that a driver should have. `service` None: there is no such account."""

    release: str = ""
    container: str = ""
    unified: bool = True
    controllers: frozenset[str] = frozenset()
    overcommit: int | None = None
    clock: Clock = field(default_factory=Clock)
    storage: str = "auto"
    has_journal_directory: bool = True
    hardware: Hardware = field(default_factory=lambda: Hardware(""))
    devices: tuple[str, ...] = ()
    missing_devices: tuple[str, ...] = ()
    unprivileged_port: int = 1024
    service: Service | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """An assignment in a file of a unit."""

    path: str
    number: int
    key: str
    is_dropin: bool


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """`values` as `systemctl show` says them, those that occur several times joined by newlines."""

    values: Mapping[str, str] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()

    def __getitem__(self, key: str) -> str:
        return self.values.get(key, "")


@dataclass(frozen=True, slots=True)
class SystemdFacts:
    """`units` by name, those of instances and vllmd-gpu.service and vllmd.target."""

    version: int = 0
    units: Mapping[str, UnitFacts] = field(default_factory=dict)
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """lstat of a path. `kind`: directory, file, link, other, '' for missing. `error`: why it could not be looked at."""

    path: str
    kind: str = ""
    uid: int = 0
    gid: int = 0
    mode: int = 0
    links: int = 1
    size: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system below a directory of ours; `role`: store, state, cache, runtime, configuration."""

    role: str
    path: str
    device: int = 0
    free_bytes: int = 0
    total_bytes: int = 0
    free_inodes: int = 0
    inodes: int = 0
    is_read_only: bool = False
    mount: str = "/"


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A lock that somebody holds. `unit`: of the process, '' for none."""

    path: str
    pid: int
    comm: str = ""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class PlaceFacts:
    """`folders`: the directories of ours; `secrets`: credentials and keys; `locks`: lock files, with the directory of each."""

    folders: tuple[Place, ...] = ()
    keys: tuple[Place, ...] = ()
    credentials: tuple[Place, ...] = ()
    published: tuple[Place, ...] = ()
    engines: tuple[Place, ...] = ()
    locks: tuple[tuple[Place, Place], ...] = ()
    held: tuple[HeldLock, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of ours, as it was raised."""

    code: str
    what: str
    hint: str = ""
    status: int = 0


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    """An instance's configuration. `files`: what was read. `endpoints`: (host, port). `is_here`: whether a start finds the model
    without a network; `network`: the sources that it would ask. `cuda`, `archs`, `python`: what its engine was built for."""

    name: str
    failure: Failure | None = None
    warnings: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    endpoints: tuple[tuple[str, int], ...] = ()
    store: str = ""
    is_selected: bool = False
    is_here: bool = True
    network: tuple[str, ...] = ()
    executable: str = ""
    cuda: str = ""
    archs: tuple[str, ...] = ()
    wants_gpu: bool = False


@dataclass(frozen=True, slots=True)
class PortFacts:
    """Who has the port of an instance. `verdict` as preflight's; `free`: a port that nobody has."""

    instance: str
    host: str
    port: int
    verdict: str
    unit: str = ""
    pids: tuple[int, ...] = ()
    comm: str = ""
    is_own: bool = False
    free: int = 0


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What a network source says of the model of an instance; `outcome`: offered, not_found, skipped, failed."""

    instance: str
    source: str
    outcome: str
    reason: str = ""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class InsideFacts:
    """What a process sees in the sandbox of a unit, as its user. Values of `devices`, `readable`, `writable`: errno, 0 for yes."""

    instance: str
    devices: Mapping[str, int] = field(default_factory=dict)
    readable: Mapping[str, int] = field(default_factory=dict)
    writable: Mapping[str, int] = field(default_factory=dict)
    cgroup: str = ""
    is_delegated: bool | None = None
    controllers: frozenset[str] = frozenset()
    nofile: int = 0
    owners: Mapping[str, tuple[int, int, int, str]] = field(default_factory=dict)
    """Of devices: uid, gid, mode, name of the group."""
