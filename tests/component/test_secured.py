"""TLS over a socket that is read in large pieces: the same bytes, and the same ends, as an SSLSocket gives."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.static_s3 import certificate
from vllmd.errors import SourceUnavailable
from vllmd.models.transfer.secured import Secured

pytestmark = pytest.mark.component


@contextmanager
def peers(directory: Path, script: Callable[[ssl.SSLSocket], None], version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, said: list[object] | None = None) -> Iterator[Secured]:
    """Both ends of one connection; the other end does as the script says, in a thread. `said` gets what it is told by TLS."""
    certificate(directory)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    theirs.maximum_version = version
    ours = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            with theirs.wrap_socket(far, server_side=True) as secured:
                script(secured)
        except (OSError, ValueError) as error:
            far.close()
            (said if said is not None else []).append(getattr(error, "reason", error))

    near.settimeout(20)
    far.settimeout(20)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield Secured(near, ours, "127.0.0.1")
    finally:
        near.close()
        thread.join()
        far.close()


def read(secured: Secured, size: int) -> bytes:
    buffer, count = memoryview(bytearray(size)), 0
    while count < size and (got := secured.recv_into(buffer[count:])):
        count += got
    return bytes(buffer[:count])


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_bytes_come_as_they_were_sent(tmp_path: Path, version: ssl.TLSVersion) -> None:
    data = os.urandom(3 << 20)

    def script(secured: ssl.SSLSocket) -> None:
        assert secured.recv(100) == b"give"
        secured.sendall(data)
        assert secured.recv(100) == b"more"
        secured.sendall(b"abc")
        secured.recv(100)

    with peers(tmp_path, script, version) as secured:
        secured.do_handshake()
        secured.sendall(b"give")
        assert read(secured, len(data)) == data
        assert secured.is_idle
        secured.sendall(b"more")
        assert secured.recv(1) == b"a"
        assert not secured.is_idle
        assert secured.recv(100) == b"bc"
        assert secured.is_idle


@pytest.mark.parametrize("is_polite", [True, False])
def test_an_end_is_an_end_with_and_without_words(tmp_path: Path, is_polite: bool) -> None:
    def script(secured: ssl.SSLSocket) -> None:
        secured.sendall(b"all")
        if is_polite:
            secured.unwrap()
        else:
            secured.shutdown(socket.SHUT_RDWR)

    with peers(tmp_path, script) as secured:
        secured.do_handshake()
        assert read(secured, 100) == b"all"
        assert secured.recv(100) == b""


def test_a_stranger_is_refused_and_the_other_side_told(tmp_path: Path) -> None:
    said: list[object] = []
    with peers(tmp_path, lambda secured: secured.close(), said=said) as secured:
        other = Secured(secured._plain, ssl.create_default_context(), "127.0.0.1")
        with pytest.raises(SourceUnavailable, match="not trusted"):
            other.do_handshake()
    assert said == ["TLSV1_ALERT_UNKNOWN_CA"]


def test_half_a_record_is_nothing_to_take_yet_and_what_found_no_room_is(tmp_path: Path) -> None:
    """Else a thread would ask again and again, with the turn that others wait for."""
    certificate(tmp_path)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    theirs.num_tickets = 0
    came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = theirs.wrap_bio(came, goes, server_side=True)
    near, far = socket.socketpair()

    def shake() -> None:
        while True:
            try:
                server.do_handshake()
                return
            except ssl.SSLWantReadError:
                far.sendall(goes.read())
                came.write(far.recv(1 << 16))

    with near, far:  # ours without a timeout, as connections are: Python would wait for it whatever the flags say
        far.settimeout(20)
        thread = threading.Thread(target=shake)
        thread.start()
        secured = Secured(near, ssl.create_default_context(cafile=str(tmp_path / "ca.pem")), "127.0.0.1")
        secured.do_handshake()
        thread.join()
        buffer = memoryview(bytearray(1000))
        assert not secured.wait(0.01)
        server.write(b"x" * 1000)
        record = goes.read()
        far.sendall(record[:500])
        assert secured.wait(20)
        assert secured.recv_now(buffer) is None
        assert not secured.wait(0.01)
        far.sendall(record[500:])
        assert secured.wait(20)
        assert secured.recv_now(buffer[:400]) == 400
        assert secured.wait(0)
        assert secured.recv_now(buffer) == 600
        assert not secured.wait(0.01)
        far.close()
        assert secured.wait(20)
        assert secured.recv_now(buffer) == 0
