"""The endpoints that an engine wants, TCP ports and unix sockets alike: what holds them, and waiting until they are free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vllmd.config.settings import Preflight
from vllmd.core.plan import Endpoint
from vllmd.preflight import ports, socketfile
from vllmd.preflight.attribution import Claim, attribute
from vllmd.preflight.claims import Ruling
from vllmd.preflight.ports import Verdict


class Refused(Exception):
    """Ends preflight; the ruling says why."""

    def __init__(self, ruling: Ruling) -> None:
        super().__init__(ruling.error)
        self.ruling = ruling


@dataclass(frozen=True, slots=True)
class Look:
    """How to look. `thorough` also finds sockets that only hold a port on which another listens: before anything is
    ended. `warn` is told what a person should know."""

    settings: Preflight
    remove_stale: bool
    warn: Callable[[str], None]
    thorough: bool = False


def claims_of(endpoint: Endpoint, look: Look) -> list[Claim]:
    """Who holds it; [] when it is free. Refused when it cannot be had, whoever holds it."""
    if endpoint.kind == "uds":
        return _socket_claims(endpoint.path, look)
    verdict, listeners = ports.look(endpoint.host, endpoint.port)
    if verdict is Verdict.UNAVAILABLE:
        hint = "Set VLLM_HOST to an address that this machine has; `ip address` lists them."
        raise Refused(Ruling(1, "address_unavailable", f"{endpoint.host} is no address of this machine", hint))
    if verdict is Verdict.NOT_PERMITTED:
        hint = "Choose a port of 1024 or more, or give the service CAP_NET_BIND_SERVICE."
        raise Refused(Ruling(1, "port_not_permitted", f"port {endpoint.port} may not be bound by this user", hint))
    if verdict.is_free:
        return []
    if look.thorough:
        listeners = ports.scan(endpoint.host, endpoint.port) or listeners
    return attribute(listeners) if listeners else _unexplained(endpoint, look)


def _unexplained(endpoint: Endpoint, look: Look) -> list[Claim]:
    """Held by nothing that has a process: connections of a server that is gone, mostly, and those end by themselves."""
    settings = look.settings
    if wait_until_free([endpoint], 0.0 if settings.dry_run else settings.port_free_timeout_s, settings.port_free_poll_s):
        return []
    if ports.remnants(ports.targets_of(endpoint.host, endpoint.port), endpoint.port):
        what = f"port {endpoint.port} is held by connections of a server that has ended"
        if settings.dry_run:  # they may be gone by the time of the start
            look.warn(what)
            return []
        raise Refused(Ruling(5, "port_held_by_closed_connections", what, "They end by themselves within a minute or two: try again."))
    what = f"port {endpoint.port} is held by a socket that does not listen, and nothing tells whose it is"
    raise Refused(Ruling(4, "listener_unattributable", what, f"As root, `lsof -nP -iTCP:{endpoint.port}` may find it."))


def _socket_claims(path: str, look: Look) -> list[Claim]:
    found = socketfile.inspect(path)
    if found.state == "refused":
        raise Refused(Ruling(1, "socket_path_refused", f"{path} {found.reason}", "Remove it, or choose another path."))
    if found.state == "stale":
        may_remove = look.remove_stale and not look.settings.dry_run
        if not (may_remove and socketfile.remove_stale(found)):
            look.warn(f"{path} is the socket of a server that has ended: remove it, or the next start fails")
    return attribute([found.listener]) if found.listener is not None else []


def holders_of(endpoint: Endpoint) -> list[Claim]:
    """Who holds it now, for a report; nothing is judged."""
    return attribute(ports.scan(endpoint.host, endpoint.port) if endpoint.kind == "tcp" else ports.listeners_of(endpoint))


def wait_until_free(endpoints: Iterable[Endpoint], timeout_s: float, poll_s: float) -> bool:
    """Whether all of them become free in time; looks at once, and then every poll_s."""
    endpoints = list(endpoints)
    end = time.monotonic() + timeout_s
    while not all(is_free(each) for each in endpoints):
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(poll_s, left))
    return True


def is_free(endpoint: Endpoint) -> bool:
    if endpoint.kind == "uds":
        return socketfile.inspect(endpoint.path).state in ("absent", "stale")
    return ports.bind_probe(endpoint.host, endpoint.port).is_free
