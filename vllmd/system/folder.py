"""A directory below one that is not trusted, held by a descriptor: root writes into what belongs to the service's account.

Whoever owns a directory can put a link in the place of anything below it, at any moment. So nothing here is found by a path
of more than one name: each step is opened from the one above, no link is followed, and what is made has the owner of the
directory that it lies in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from vllmd.errors import TryLater
from vllmd.system.owner import controller

_STEP = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
LOCK_S = 10.0
_AGAIN_S = 0.05


class Folder:
    """Closed by `with`. OSError everywhere; ENOTDIR or ELOOP for a link in the way."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._fd = descriptor
        self.path = path

    @classmethod
    def open(cls, root: Path, *names: str, make: bool = False) -> Self:
        """`root` is trusted, and may be a link (of a state that was moved to a larger disk) where nobody else could have put it there.
        What is missing below it is made, mode 0755, where `make` is set."""
        if make:
            root.mkdir(parents=True, exist_ok=True, mode=0o755)
        is_trusted = controller(root.parent) in (0, os.geteuid())
        descriptor, path = os.open(root, _STEP & ~os.O_NOFOLLOW if is_trusted else _STEP), root
        for name in names:
            path = path / name
            try:
                below = _step(descriptor, name, make=make)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
            finally:
                os.close(descriptor)
            descriptor = below
        return cls(descriptor, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Against others who write here. TryLater: the directory's owner could hold it for ever."""
        end = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TryLater("folder_locked", f"another program writes in {self.path} for {LOCK_S:g} s", f"fuser -v {self.path}") from None
                time.sleep(_AGAIN_S)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def names(self) -> list[str]:
        """Of everything in it."""
        return os.listdir(self._fd)  # noqa: PTH208 - by descriptor

    def read(self, name: str, limit_bytes: int) -> bytes | None:
        """None where there is none. A link, a fifo or a file that is too large is an OSError."""
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / name)) from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(self.path / name))
            with open(descriptor, "rb", closefd=False) as stream:
                content = stream.read(limit_bytes + 1)
        finally:
            os.close(descriptor)
        if len(content) > limit_bytes:
            raise OSError(errno.EFBIG, f"larger than {limit_bytes} bytes", str(self.path / name))
        return content

    def write(self, name: str, content: str | bytes, mode: int, whose: tuple[int, int] = (-1, -1)) -> None:
        """As system/files.write_atomic: the old content or the new; whatever has the name is replaced, never followed. `whose`: user and
        group for root to give it to, -1 for those of the directory."""
        temporary = f".{name}.{os.urandom(6).hex()}.tmp"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
            with open(descriptor, "wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                self._own(descriptor, whose)
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)
            os.replace(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._fd)
            raise
        os.fsync(self._fd)

    def mode_of(self, name: str) -> int:
        """Permission bits; -1 for what is no regular file, or not there."""
        try:
            about = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return -1
        return stat.S_IMODE(about.st_mode) if stat.S_ISREG(about.st_mode) else -1

    def link(self, name: str, target: str) -> bool:
        """A link of that name, unless something has it; whether it was made."""
        try:
            os.symlink(target, name, dir_fd=self._fd)
        except FileExistsError:
            return False
        return True

    def _own(self, descriptor: int, whose: tuple[int, int]) -> None:
        """Owner and group of the directory. Who is not root may give the group only where it is a member: then it stays as made."""
        about = os.fstat(self._fd)
        if os.geteuid() == 0:
            user, group = whose
            os.fchown(descriptor, about.st_uid if user < 0 else user, about.st_gid if group < 0 else group)
        elif os.fstat(descriptor).st_gid != about.st_gid:
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, -1, about.st_gid)


def _step(above: int, name: str, *, make: bool) -> int:
    is_new = False
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=above)
            is_new = True
    descriptor = os.open(name, _STEP, dir_fd=above)
    if is_new and os.geteuid() == 0:
        # By descriptor: by name it could by now be a hard link to somebody else's file. No directory can be one.
        about = os.fstat(above)
        os.fchown(descriptor, about.st_uid, about.st_gid)
        os.fchmod(descriptor, 0o755)  # with root's umask at 077 neither the service nor dependents could look into it
    return descriptor
