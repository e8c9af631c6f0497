"""Is the port free, and if not, whose is it? An exclusive bind decides; the kernel's socket table explains.

A scan alone says "free" of a port that a loading vLLM has bound without listening, and a bind with SO_REUSEADDR or
SO_REUSEPORT succeeds over it: so the probe binds with neither. That in turn trips over connections of a server that is
gone (TIME_WAIT and the like), which are no obstacle to a server that sets SO_REUSEADDR, as all engines do.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from vllmd.core.plan import Endpoint
from vllmd.errors import ConfigError
from vllmd.preflight import socketfile
from vllmd.preflight.report import Listener
from vllmd.system import boundsockets, cgroupnames, sockdiag
from vllmd.system.sockdiag import CONNECTED_STATES, Socket, TcpState

_WILDCARDS = ("0.0.0.0", "::")


class Verdict(Enum):
    """What an exclusive bind found. REMNANTS: only connections that a server passes over; counts as free."""

    FREE = "free"
    REMNANTS = "remnants"
    HELD = "held"
    UNAVAILABLE = "unavailable"
    NOT_PERMITTED = "not_permitted"

    @property
    def is_free(self) -> bool:
        return self in (Verdict.FREE, Verdict.REMNANTS)


@dataclass(frozen=True, slots=True)
class Target:
    """One address that the engine would bind."""

    family: int
    sockaddr: tuple[str, int] | tuple[str, int, int, int]

    @property
    def address(self) -> str:
        return self.sockaddr[0].partition("%")[0]


def targets_of(host: str, port: int) -> tuple[Target, ...]:
    """Every address of the host, as the engine's own resolver sees it. ConfigError when there is none."""
    for family in _FAMILIES:  # an address needs no resolver, and Python's loads a codec for host names first
        with contextlib.suppress(OSError, UnicodeError):
            socket.inet_pton(family, host)
            return (Target(family, (host, port)),)
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            "host_unresolvable", f"the host {host!r} cannot be resolved: {error}", "Set VLLM_HOST to an address of this machine."
        ) from None
    targets = tuple(dict.fromkeys(Target(family, address) for family, _, _, _, address in found if family in _FAMILIES))  # type: ignore[arg-type]
    _resolved[host, port] = targets
    return targets


_resolved: dict[tuple[str, int], tuple[Target, ...]] = {}
"""What names stood for when they were last resolved: the probes of a start do not wait for a name server each time."""
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def bind_probe(host: str, port: int) -> Verdict:
    """Whether a server could have the port now. Leaves nothing bound; microseconds when it is free."""
    return look(host, port)[0]


def look(host: str, port: int) -> tuple[Verdict, list[Listener]]:
    """The verdict, and where it is HELD who holds the port: the listening sockets, else the bound ones, else connections
    of living processes; [] when nothing tells. Milliseconds with 20,000 sockets."""
    targets = targets_of(host, port)
    codes = [_try_bind(target) for target in targets]
    if errno.EADDRINUSE in codes:
        return _why_in_use(targets, port)
    if errno.EACCES in codes:
        return Verdict.NOT_PERMITTED, []
    # A name may resolve to an address of a family that is switched off here: one that works is enough.
    return (Verdict.FREE if 0 in codes else Verdict.UNAVAILABLE), []


def _try_bind(target: Target, option: int | None = None) -> int:
    try:
        with socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            if option is not None:
                probe.setsockopt(socket.SOL_SOCKET, option, 1)
            probe.bind(target.sockaddr)
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0


def _why_in_use(targets: tuple[Target, ...], port: int) -> tuple[Verdict, list[Listener]]:
    holders = _listening(targets, port) or _bound(targets, port)
    if holders:
        return Verdict.HELD, [_listener(each) for each in holders]
    left = remnants(targets, port)
    if left and all(_try_bind(target, socket.SO_REUSEADDR) != errno.EADDRINUSE for target in targets):
        return Verdict.REMNANTS, []
    return Verdict.HELD, [_listener(each) for each in left if each.inode]


def remnants(targets: Iterable[Target], port: int) -> list[Socket]:
    """Connections with this local port that outlived their listener."""
    return _conflicting(targets, sockdiag.sockets_on(port, CONNECTED_STATES))


def scan(host: str, port: int) -> list[Listener]:
    """All sockets that keep a server from having host:port, listening and bound, with uid, cgroup and unit, without
    pids (attribution.py). [] when there is none, whatever is left in TIME_WAIT. OSError without netlink and /proc."""
    targets = targets_of(host, port)
    return [_listener(each) for each in _listening(targets, port) + _bound(targets, port)]


def _listening(targets: Iterable[Target], port: int) -> list[Socket]:
    return _conflicting(targets, sockdiag.listeners(port))


def _bound(targets: Iterable[Target], port: int) -> list[Socket]:
    """Five times the work of _listening: the kernel goes through all bound sockets."""
    if sockdiag.shows_bound_sockets():
        return _conflicting(targets, sockdiag.sockets_on(port, frozenset({TcpState.BOUND})))
    return _conflicting(targets, boundsockets.on_port(port))


def _conflicting(targets: Iterable[Target], sockets: Iterable[Socket]) -> list[Socket]:
    targets = tuple(targets)
    return [each for each in sockets if any(_conflict(target, each) for target in targets)]


def _conflict(target: Target, other: Socket) -> bool:
    """Whether the kernel lets only one of them have the port. A specific address collides with the wildcard of its
    family, both ways; an IPv6 wildcard that is not v6only takes IPv4 too."""
    wanted, held = _unmapped(target.address), _unmapped(other.address)
    if (":" in wanted) == (":" in held):
        return wanted == held or wanted in _WILDCARDS or held in _WILDCARDS
    if held == "::":
        return other.v6only is not True
    return wanted == "::" and not _v6only_by_default()


def _unmapped(address: str) -> str:
    return address.removeprefix("::ffff:") if "." in address else address


def _v6only_by_default() -> bool:
    try:
        with open("/proc/sys/net/ipv6/bindv6only", encoding="utf-8") as text:
            return text.read().strip() == "1"
    except OSError:
        return False


_STATES = {TcpState.LISTEN: "listening", TcpState.BOUND: "bound"}


def _listener(found: Socket) -> Listener:
    cgroup = cgroupnames.path_of(found.cgroup_id)
    return Listener(
        address=found.address,
        port=found.port,
        inode=found.inode,
        uid=found.uid,
        cgroup=cgroup,
        unit=cgroupnames.unit_of(cgroup),
        state=_STATES.get(found.state, "connected"),
    )


def listeners_of(endpoint: Endpoint) -> list[Listener]:
    """Who listens at an endpoint right now, with its cgroup: asked at every probe, so that another server's answer on
    our port is never taken for our engine's. Under a millisecond; a host that does not resolve has no listeners."""
    if endpoint.kind == "uds":
        found = socketfile.inspect(endpoint.path).listener
        return [found] if found is not None else []
    try:
        targets = _resolved.get((endpoint.host, endpoint.port)) or targets_of(endpoint.host, endpoint.port)
    except ConfigError:
        return []
    return [_listener(each) for each in _conflicting(targets, sockdiag.listeners(endpoint.port))]


def is_inside(listener: Listener, cgroup: str) -> bool:
    """Whether a listener was opened in this cgroup or below it ('' and '/' hold nobody in particular)."""
    below = cgroup.rstrip("/") + "/"
    return below != "/" and (listener.cgroup + "/").startswith(below)


