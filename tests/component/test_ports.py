"""Who holds a port: the bind probe and the scan, against real sockets of every kind."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cgroups import ServiceCgroup
from tests.listeners import NOBODY, ROOT, holding
from tests.needs import need
from tests.ports import free_port
from vllmd.core.plan import Endpoint
from vllmd.errors import ConfigError
from vllmd.preflight import ports, socketfile
from vllmd.preflight.ports import Verdict
from vllmd.system import boundsockets, cgroupnames, procfs, sockdiag
from vllmd.system.sockdiag import TcpState

pytestmark = pytest.mark.component


@pytest.fixture
def port() -> int:
    return free_port()


def held(host: str, port: int, *, listening: bool = True, option: int | None = None, v6only: bool | None = None) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if option is not None:
        sock.setsockopt(socket.SOL_SOCKET, option, 1)
    if v6only is not None:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    sock.bind((host, port))
    if listening:
        sock.listen()
    return sock


HOSTS = ("127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::")
HOLDERS = [(host, None) for host in HOSTS] + [("::", True), ("::ffff:127.0.0.1", False)]


@pytest.mark.parametrize(("target", "holder"), list(itertools.product(HOSTS, HOLDERS)), ids=str)
def test_scan_names_exactly_the_listeners_over_which_the_kernel_refuses_a_bind(port: int, target: str, holder: tuple[str, bool | None]) -> None:
    with held(holder[0], port, v6only=holder[1]):
        verdict = ports.bind_probe(target, port)
        found = ports.scan(target, port)
    assert verdict in (Verdict.FREE, Verdict.HELD)
    assert bool(found) == (verdict is Verdict.HELD)


@pytest.mark.parametrize("option", [None, socket.SO_REUSEADDR, socket.SO_REUSEPORT])
@pytest.mark.parametrize("listening", [True, False])
def test_a_socket_is_seen_whether_it_listens_or_only_holds_the_port_and_whatever_it_shares(port: int, option: int | None, listening: bool) -> None:
    with held("127.0.0.1", port, listening=listening, option=option) as sock:
        inode = os.fstat(sock.fileno()).st_ino
        assert ports.bind_probe("127.0.0.1", port) is Verdict.HELD
        [found] = ports.scan("0.0.0.0", port)
        assert (found.state, found.inode, found.uid, found.port) == ("listening" if listening else "bound", inode, os.geteuid(), port)


def test_a_probe_leaves_the_port_as_it_was(port: int) -> None:
    assert ports.bind_probe("0.0.0.0", port) is Verdict.FREE
    held("0.0.0.0", port).close()


@contextlib.contextmanager
def connection(port: int, *, reuse: bool) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection to a listener that is closed already; the first end is the server's."""
    option = socket.SO_REUSEADDR if reuse else None
    with held("127.0.0.1", port, option=option) as listener:
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
    with server, client:
        yield server, client


def test_connections_in_time_wait_alone_do_not_hold_a_port(port: int) -> None:
    with connection(port, reuse=True) as (server, client):
        server.close()
        client.close()
    assert {each.state for each in sockdiag.sockets_on(port, frozenset(TcpState))} == {TcpState.TIME_WAIT}
    with pytest.raises(OSError, match="in use"):
        held("127.0.0.1", port)
    assert ports.bind_probe("127.0.0.1", port) is Verdict.REMNANTS
    assert ports.scan("127.0.0.1", port) == []


def test_a_bound_socket_is_not_taken_for_time_wait(port: int) -> None:
    with connection(port, reuse=True) as (server, client):
        server.close()
        client.close()
    with held("127.0.0.1", port, listening=False, option=socket.SO_REUSEADDR):
        assert ports.bind_probe("127.0.0.1", port) is Verdict.HELD
        assert [each.state for each in ports.scan("127.0.0.1", port)] == ["bound"]


def test_a_connection_that_a_server_cannot_pass_over_holds_the_port_and_is_named(port: int) -> None:
    with connection(port, reuse=False) as (server, _):
        verdict, [found] = ports.look("127.0.0.1", port)
        assert verdict is Verdict.HELD
        assert (found.state, found.inode) == ("connected", os.fstat(server.fileno()).st_ino)


def test_a_host_name_stands_for_all_its_addresses(port: int) -> None:
    with held("127.0.0.1", port):
        assert ports.bind_probe("localhost", port) is Verdict.HELD


def test_a_host_that_does_not_resolve_is_an_error_and_not_a_literal(port: int) -> None:
    with pytest.raises(ConfigError) as caught:
        ports.bind_probe("no-such-host.invalid", port)
    assert caught.value.code == "host_unresolvable"


def test_an_address_of_another_machine_is_told_from_a_busy_one(port: int) -> None:
    assert ports.bind_probe("198.51.100.7", port) is Verdict.UNAVAILABLE


def test_without_netlink_the_tables_of_proc_give_the_same_answer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with held("0.0.0.0", port), held("::1", port, v6only=True):
        by_netlink = sorted(sockdiag.listeners(port), key=lambda s: s.address)
        monkeypatch.setattr(sockdiag, "_NETLINK_SOCK_DIAG", 9999)
        by_proc = sorted(sockdiag.listeners(port), key=lambda s: s.address)
    assert len(by_proc) == 2
    assert [(s.address, s.inode, s.uid, s.state) for s in by_netlink] == [(s.address, s.inode, s.uid, s.state) for s in by_proc]
    assert [s.v6only for s in by_netlink] == [None, True]


def test_a_bound_socket_is_found_without_the_help_of_a_new_kernel(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 6.8 shows bound sockets in no table: they are asked for their address one by one."""
    ask = sockdiag.sockets_on

    def of_an_old_kernel(port: int, states: frozenset[TcpState]) -> list[sockdiag.Socket]:
        return ask(port, states - {TcpState.BOUND})

    monkeypatch.setattr(sockdiag, "sockets_on", of_an_old_kernel)
    monkeypatch.setattr(sockdiag, "shows_bound_sockets", lambda: False)
    with held("127.0.0.1", port, listening=False) as sock:
        [found] = ports.scan("127.0.0.1", port)
        assert (found.state, found.inode) == ("bound", os.fstat(sock.fileno()).st_ino)
    assert boundsockets.on_port(port) == []


def test_pids_are_found_by_inode(port: int) -> None:
    with holding("127.0.0.1", port) as other:
        [found] = ports.scan("127.0.0.1", port)
        assert procfs.socket_holders([found.inode], procfs.pids()) == {found.inode: [other.pid]}


@pytest.fixture
def service() -> Iterator[ServiceCgroup]:
    group = ServiceCgroup()
    yield group
    group.remove()


def test_a_listener_is_placed_in_its_cgroup_and_unit(port: int, service: ServiceCgroup) -> None:
    engine = service.path / "engine-1234"
    engine.mkdir()
    with holding("0.0.0.0", port, before=service.enter(["/bin/sh", "-c", f'echo $$ > {engine}/cgroup.procs && exec "$@"', "sh"])):
        [found] = ports.listeners_of(Endpoint("tcp", "0.0.0.0", port))
    path = cgroupnames.unified_mount().path(str(engine))
    assert (found.cgroup, found.unit) == (path, "vllmd@test.service")
    assert ports.is_inside(found, path)
    assert ports.is_inside(found, path.rpartition("/")[0])
    assert not ports.is_inside(found, path[:-1])
    assert not ports.is_inside(found, "/")


AS_NOBODY = """
import os, sys
from vllmd.preflight import ports
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
print([(found.uid, found.unit) for found in ports.scan("127.0.0.1", int(sys.argv[1]))])
"""


def test_anybody_learns_uid_and_unit_of_another_users_listener(port: int, service: ServiceCgroup) -> None:
    need(os.geteuid() == 0, "root")
    with holding("127.0.0.1", port, before=service.enter([])):
        argv = [sys.executable, "-c", AS_NOBODY, str(port)]
        told = subprocess.run(argv, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30, check=True).stdout
    assert told.strip() == "[(0, 'vllmd@test.service')]"


def test_listeners_of_two_servers_that_share_a_port_are_both_told(port: int) -> None:
    with held("127.0.0.1", port, option=socket.SO_REUSEPORT), held("127.0.0.1", port, option=socket.SO_REUSEPORT):
        assert len(ports.listeners_of(Endpoint("tcp", "127.0.0.1", port))) == 2


def test_a_bound_socket_is_no_listener_of_an_endpoint(port: int) -> None:
    with held("127.0.0.1", port, listening=False):
        assert ports.listeners_of(Endpoint("tcp", "127.0.0.1", port)) == []


class TestUnixSockets:
    def test_a_live_one_names_its_listener(self, tmp_path: Path) -> None:
        path = str(tmp_path / "e.sock")
        with holding(path, 0) as other:
            found = socketfile.inspect(path)
            assert found.state == "live"
            assert found.listener is not None
            assert (found.listener.pids, found.listener.uid) == ((other.pid,), os.geteuid())
            assert ports.listeners_of(Endpoint("uds", path=path)) == [found.listener]
        assert socketfile.inspect(path).state == "stale"
        assert ports.listeners_of(Endpoint("uds", path=path)) == []

    def test_one_with_a_full_queue_is_alive(self, tmp_path: Path) -> None:
        path = str(tmp_path / "e.sock")
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(path)
            server.listen(0)
            for _ in range(2):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.connect(path)
            assert socketfile.inspect(path).state == "live"

    def test_one_that_is_bound_and_does_not_listen_yet_is_stale_to_a_connection(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "e.sock"))
            assert ports.listeners_of(Endpoint("uds", path=str(tmp_path / "e.sock"))) == []

    def test_a_path_longer_than_sun_path_is_reached(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / ("x" * 120)
        folder.mkdir()
        monkeypatch.chdir(folder)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("e.sock")
            server.listen()
            assert socketfile.inspect(str(folder / "e.sock")).state == "live"

    @pytest.mark.parametrize("kind", ["symlink", "file"])
    def test_what_is_no_socket_is_refused(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "e.sock"
        if kind == "symlink":
            path.symlink_to(tmp_path / "elsewhere")
        else:
            path.write_text("precious")
        found = socketfile.inspect(str(path))
        assert found.state == "refused"
        assert not socketfile.remove_stale(found)
        assert path.is_symlink() or path.read_text() == "precious"

    def test_a_stale_one_is_removed_only_while_it_is_the_same(self, tmp_path: Path) -> None:
        path = tmp_path / "e.sock"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        found = socketfile.inspect(str(path))
        path.rename(tmp_path / "old.sock")
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
            successor.listen()
            assert not socketfile.remove_stale(found)
        assert path.exists()
        assert socketfile.remove_stale(socketfile.inspect(str(path)))
        assert not path.exists()


def test_other_users_sockets_of_every_uid_are_told_apart(port: int) -> None:
    need(os.geteuid() == 0, "root")
    with holding("127.0.0.1", port, "--uid", str(NOBODY)):
        [found] = ports.scan("127.0.0.1", port)
    assert found.uid == NOBODY


def test_a_name_is_not_resolved_again_at_every_probe(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with held("127.0.0.1", port):
        assert len(ports.listeners_of(Endpoint("tcp", "localhost", port))) == 1

        def stuck(*_args: object, **_kwargs: object) -> None:
            raise AssertionError("the name server was asked")

        monkeypatch.setattr(socket, "getaddrinfo", stuck)
        assert len(ports.listeners_of(Endpoint("tcp", "localhost", port))) == 1
