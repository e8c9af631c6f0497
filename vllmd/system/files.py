"""Small files, written so that a power cut leaves the old content or the new, and read as hostile input.

launch.json, last.json, status.json and every other file of ours goes through here; OSError becomes one of our errors
in `storage_error`, the only place that knows which errno means what to an operator.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from vllmd.errors import PermissionMissing, StorageFailed, TryLater, VllmdError

_STORAGE = {
    errno.ENOSPC: ("disk_full", "Free space on that file system; `df -h` shows it."),
    errno.EDQUOT: ("quota_exceeded", "Raise the quota of the service's user, or free space; `quota -v` shows it."),
    errno.EIO: ("io_error", "The storage is failing: look at the kernel's log, `journalctl -k -p err`."),
    errno.EROFS: ("read_only", "Remount the file system writable; the kernel makes it read-only after errors (`journalctl -k`)."),
}
_TEMPORARY = ".tmp"
_PERMISSION = {errno.EACCES, errno.EPERM}
_EXHAUSTED = {
    errno.EMFILE: "Raise LimitNOFILE= of the unit (`ulimit -n`): vllmd needs some 60 descriptors, an engine thousands.",
    errno.ENFILE: "The whole host is out of descriptors: `sysctl fs.file-nr`.",
    errno.ENOMEM: "`free -h` shows the memory, `systemctl show -p MemoryMax` the unit's limit.",
}


def storage_error(error: OSError, what: str) -> VllmdError:
    """The error to raise for an OSError met while doing `what` ('write /run/x/status.json')."""
    reason = error.strerror or str(error)
    if (refused := exhausted(error, f"cannot {what}")) is not None:
        return refused
    if error.errno in _PERMISSION:
        return PermissionMissing(
            "permission_missing", f"cannot {what}: {reason}", "Check the owner and mode of that path and of its directories."
        )
    code, hint = _STORAGE.get(error.errno or 0, ("storage_failed", "Check that the path exists and is what it should be."))
    return StorageFailed(code, f"cannot {what}: {reason}", hint)


def exhausted(error: BaseException, what: str) -> TryLater | None:
    """The error to raise when it was the host that had no memory or descriptors left; None for every other reason."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if number not in _EXHAUSTED:
        return None
    return TryLater("host_exhausted", f"{what}: {os.strerror(number)}", _EXHAUSTED[number])


def write_atomic(path: Path, data: bytes | str, *, mode: int = 0o644, fsync: bool = True) -> None:
    """Replace `path` by a file with exactly this content and mode (whatever the umask is). OSError on failure, then
    nothing changed and nothing is left. The directory must exist; a symlink at `path` is replaced, never followed."""
    content = data.encode() if isinstance(data, str) else data
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    temporary = f".{path.name[:100]}.{os.urandom(6).hex()}{_TEMPORARY}"
    try:
        try:
            _write_new(directory, temporary, content, mode, sync=fsync)
            os.replace(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
        if fsync:
            os.fsync(directory)
    finally:
        os.close(directory)


def directory_like(path: Path, like: Path) -> None:
    """Makes the directory, with the mode and owner of `like`: with root's umask at 077 the service could not look into it. OSError."""
    if path.is_dir():
        return
    status = like.stat()
    path.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(path, status.st_uid, status.st_gid)
    path.chmod(status.st_mode & 0o777)


def remove_unfinished(directory: Path) -> None:
    """What a write_atomic left there when it was killed in the middle. Only for a directory in which nobody writes now."""
    with contextlib.suppress(OSError):
        for path in directory.glob(f".*{_TEMPORARY}"):
            with contextlib.suppress(OSError):
                path.unlink()


def _write_new(directory: int, name: str, content: bytes, mode: int, *, sync: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fchmod(descriptor, mode)  # after the content: a secret is never readable half-way
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_below(base: Path, names: Sequence[str], limit_bytes: int) -> bytes:
    """A regular file that others may have prepared, `base`/names: no link in its way is followed. OSError as read_small."""
    directory = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            os.close(directory)
            directory = inner
        return _read(os.open(names[-1], _READING, dir_fd=directory), base, limit_bytes)
    finally:
        os.close(directory)


def read_small(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file of at most this size. OSError: ELOOP for a symlink, EINVAL for anything that is no
    regular file (a fifo would block for ever), EFBIG when it is larger."""
    return _read(os.open(path, _READING), path, limit_bytes)


_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _read(descriptor: int, path: Path, limit_bytes: int) -> bytes:
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = bytearray()
        while piece := os.read(descriptor, min(limit_bytes + 1 - len(content), 1 << 16)):
            content += piece
            if len(content) > limit_bytes:
                raise OSError(errno.EFBIG, f"larger than {limit_bytes} bytes", str(path))
        return bytes(content)
    finally:
        os.close(descriptor)
