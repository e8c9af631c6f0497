"""Moves the bytes of a body from a socket into a file.

Plain: splice(2), socket to pipe to file, which copies each byte once and never shows it to Python (1.7 s of CPU for 3.2 GB
against 2.5 s by recv and write). Encrypted, or on a file system without splice: through one buffer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable

from vllmd.models.transfer.connection import Connection
from vllmd.models.transfer.secured import Secured
from vllmd.system.files import storage_error

CHUNK_BYTES = 1 << 20
TOLD_BYTES = 4 << 20
LATE_S = 0.1
"""Bytes are told of when there are so many of them, or after that time: for each piece it took a tenth of the speed."""
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class Receiver:
    """A thread's own pipe and buffer. `close` it."""

    def __init__(self) -> None:
        self._pipe: tuple[int, int] | None = None
        self._pipe_bytes = 0
        self._buffer = memoryview(b"")
        self._splices = True

    def close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe[0])
            os.close(self._pipe[1])
            self._pipe = None

    def copy(self, source: Connection, fd: int, begin: int, end: int, name: str, moved: Callable[[int], None]) -> None:
        """Bytes [begin, end) of the file come now. `moved(position)` now and then, of what is in the file.

        OSError of the network (ConnectionResetError where the body ends early), Again; StorageFailed of the disk.
        """
        position = begin
        first = source.first(end - begin)
        if first:
            write_all(fd, first, position, name)
            position += len(first)
            moved(position)
        with source.patience(LATE_S):
            while position < end:
                if source.secured is not None:
                    position = self._decrypted(source, source.secured, fd, position, end, name, moved)
                elif not self._splices or end - position < CHUNK_BYTES // 8:  # a short body is not worth a pipe
                    position = self._buffered(source, fd, position, end, name, moved)
                else:
                    position = self._spliced(source, fd, position, end, name, moved)

    @property
    def buffer(self) -> memoryview:
        if not self._buffer:
            self._buffer = memoryview(bytearray(CHUNK_BYTES))
        return self._buffer

    def skip(self, source: Connection, count: int) -> None:
        """Bytes that are there already come once more."""
        count -= len(source.first(count))
        while count:
            began = time.monotonic()
            with source.waiting():
                got = source.wire.recv_into(self.buffer[:count])
            if not got:
                raise ConnectionResetError("the body ended early")
            source.moved(got, time.monotonic() - began)
            count -= got

    def _buffered(self, source: Connection, fd: int, position: int, end: int, name: str, moved: Callable[[int], None]) -> int:
        """What comes next."""
        began, count = time.monotonic(), -1
        with source.waiting():
            while count < 0:
                with contextlib.suppress(BlockingIOError):
                    count = source.plain.recv_into(self.buffer[: end - position])
        if not count:
            raise _early(end - position)
        write_all(fd, self.buffer[:count], position, name)
        moved(position + count)
        source.moved(count, time.monotonic() - began)
        return position + count

    def _decrypted(self, source: Connection, wire: Secured, fd: int, begin: int, end: int, name: str, moved: Callable[[int], None]) -> int:
        """Up to the end, or to where it is told of."""
        position, waited_s = begin, 0.0
        started = now = time.monotonic()
        is_over = False
        try:
            while position < end and position - begin < TOLD_BYTES and now - started < LATE_S and not is_over:
                with source.waiting():  # a source that stands still keeps back nothing of what came
                    if not wire.wait(LATE_S if position > begin else None):
                        break
                waited_s += time.monotonic() - now
                with wire.turn:
                    while position < end and position - begin < TOLD_BYTES:
                        count = wire.recv_now(self.buffer[: end - position])
                        if not count:
                            is_over = count == 0
                            break
                        write_all(fd, self.buffer[:count], position, name)
                        position += count
                now = time.monotonic()
        finally:
            if position > begin:
                moved(position)
        if is_over and position == begin:
            raise _early(end - position)
        source.moved(position - begin, waited_s)
        return position

    def _spliced(self, source: Connection, fd: int, begin: int, end: int, name: str, moved: Callable[[int], None]) -> int:
        """Up to the end, or to where it is told of."""
        pipe = self._pipe or self._make_pipe()
        size, wire = self._pipe_bytes, source.plain.fileno()
        position, waited_s = begin, 0.0
        started = now = time.monotonic()
        try:
            while position < end and position - begin < TOLD_BYTES and now - started < LATE_S and self._splices:
                source.waits_since(now)
                try:
                    count = os.splice(wire, pipe[1], min(end - position, size))
                except BlockingIOError:  # a source that stands still keeps back nothing of what came
                    if position > begin:
                        break
                    continue
                before, now = now, time.monotonic()
                waited_s += now - before
                source.waits_since(0.0)
                if not count:
                    raise _early(end - position)
                self._emptied(pipe[0], fd, position, count, name)
                position += count
                now = time.monotonic()
        finally:
            source.waits_since(0.0)
            if position > begin:
                moved(position)
        source.moved(position - begin, waited_s)
        return position

    def _emptied(self, pipe: int, fd: int, position: int, count: int, name: str) -> None:
        done = 0
        try:
            while done < count:
                done += os.splice(pipe, fd, count - done, offset_dst=position + done)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in _UNSUPPORTED:
                self._splices = False
                self._drained(pipe, fd, position + done, count - done, name)
                return
            self.close()  # what is left in the pipe belongs to nobody
            if isinstance(error, OSError):
                raise storage_error(error, f"write {_path(fd, name)}") from error
            raise

    def _drained(self, pipe: int, fd: int, position: int, count: int, name: str) -> None:
        """On a file system without splice: what is in the pipe by read and write."""
        try:
            while count and (rest := os.read(pipe, count)):
                write_all(fd, rest, position, name)
                position, count = position + len(rest), count - len(rest)
        except BaseException:
            self.close()
            raise

    def _make_pipe(self) -> tuple[int, int]:
        self._pipe = os.pipe2(os.O_CLOEXEC)
        try:
            self._pipe_bytes = fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        except OSError:  # the user's share of pipes is used up
            self._pipe_bytes = fcntl.fcntl(self._pipe[1], fcntl.F_GETPIPE_SZ)
        return self._pipe


def _early(count: int) -> ConnectionResetError:
    return ConnectionResetError(f"the body ended {count} bytes early")


def _path(fd: int, name: str) -> str:
    """The file and where it is: which disk is full is what an operator must know."""
    try:
        return f"{name} to {os.readlink(f'/proc/self/fd/{fd}')}"  # noqa: PTH115 - no path of a file system
    except OSError:
        return name


def write_all(fd: int, data: bytes | memoryview, position: int, name: str) -> None:
    """StorageFailed."""
    rest = memoryview(data)
    try:
        while rest:
            count = os.pwrite(fd, rest, position)
            position += count
            rest = rest[count:]
    except OSError as error:
        raise storage_error(error, f"write {_path(fd, name)}") from error
