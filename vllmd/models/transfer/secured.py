"""TLS over a socket that is read in large pieces.

An SSLSocket asks the kernel twice for each record of 16 KiB, and wakes its thread for each. Here what has come is taken at once, and its
records are decrypted one after the other. No more threads do so at a time than there are processors, each until nothing more is there or
some MiB are in the file (`turn`): each record gives the interpreter's lock away and wants it back, and eight threads that do so
spend more on the lock, and on memory that is cold again, than on the records.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import ssl
import threading

from vllmd.models.transfer import tls

READ_BYTES = 512 << 10
_TURNS = itertools.cycle([threading.Lock() for _ in range(os.cpu_count() or 1)])
"""Plain locks, shared out once: a semaphore of Python's cost a tenth of the CPU."""


class Secured:
    """Of a connected socket, which stays its maker's: to close it is enough. Methods as a socket has them."""

    def __init__(self, plain: socket.socket, secure: ssl.SSLContext, host: str) -> None:
        self._plain = plain
        self._host = host
        self._came, self._goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = secure.wrap_bio(self._came, self._goes, server_hostname=host)
        self._poll = select.poll()
        self._poll.register(plain, select.POLLIN)
        self._is_empty = True
        """No whole record has come that was not taken."""
        self.turn = next(_TURNS)
        """To be held from the first of what is there to its last."""
        self._buffer = memoryview(bytearray(READ_BYTES))

    @property
    def is_idle(self) -> bool:
        """Nothing has come that nobody asked for, as far as it was read."""
        return not self._came.pending and not self._tls.pending()

    def do_handshake(self) -> None:
        """SourceUnavailable where the certificate is not trusted."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send()
                self._fill()
            except ssl.SSLCertVerificationError as error:
                self._send()  # the other side is told why
                raise tls.refused(self._host, error) from error
            else:
                self._send()
                return

    def sendall(self, data: bytes) -> None:
        self._tls.write(data)
        self._send()

    def recv(self, count: int) -> bytes:
        buffer = bytearray(min(count, READ_BYTES))
        return bytes(buffer[: self.recv_into(memoryview(buffer))])

    def recv_into(self, buffer: memoryview) -> int:
        """Waits for the first byte, and takes all that came with it, as far as there is room. 0 at the end."""
        while (count := self._decrypted(buffer)) is None:
            self._fill()
        return count

    def wait(self, limit_s: float | None) -> bool:
        """Until there is something to take, or the end; False when that takes longer."""
        if not self._is_empty:
            return True
        return bool(self._poll.poll(None if limit_s is None else limit_s * 1000))

    def recv_now(self, buffer: memoryview) -> int | None:
        """What is there, as far as there is room; None where that is nothing. 0 at the end."""
        try:
            while (count := self._decrypted(buffer)) is None:
                self._fill(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        return count

    def _decrypted(self, buffer: memoryview) -> int | None:
        """None where more must come first."""
        count, self._is_empty = 0, False
        try:
            while count < len(buffer):
                got = int(self._tls.read(len(buffer) - count, buffer[count:]))
                if not got:
                    break
                count += got
        except ssl.SSLWantReadError:
            self._is_empty = True
            self._send()  # where new keys were asked for
            return count or None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            pass  # the next call finds the end again
        return count

    def _fill(self, flags: int = 0) -> None:
        count = self._plain.recv_into(self._buffer, 0, flags)
        if count:
            self._came.write(self._buffer[:count])
        else:
            self._came.write_eof()

    def _send(self) -> None:
        if data := self._goes.read():
            self._plain.sendall(data)
