"""One supervisor per instance: a lock in its runtime directory, released by the kernel when the supervisor dies."""

from __future__ import annotations

import fcntl
import os
from types import TracebackType

from vllmd.config.paths import Paths
from vllmd.errors import TryLater
from vllmd.system.files import remove_unfinished, storage_error


class InstanceLock:
    """Also makes the directories that systemd's *Directory= settings would have made. TryLater when it is held."""

    def __init__(self, paths: Paths, instance: str) -> None:
        self._instance = instance
        self._own = (paths.instance_runtime(instance), paths.instance_state(instance))
        self._directories = (*self._own, paths.sockets, paths.locks, paths.cache)
        self._path = paths.instance_runtime(instance) / "lock"
        self._fd = -1

    def __enter__(self) -> InstanceLock:
        try:
            for directory in self._directories:
                directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            if self._own[1].stat().st_uid == os.geteuid():
                self._own[1].chmod(0o755)  # whatever the umask is: everybody may read why it last ended (last.json)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error(error, f"prepare {error.filename or self._path}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            what = f"{self._instance} is supervised already, by pid {holder or 'unknown'}"
            raise TryLater("instance_locked", what, f"systemctl status vllmd@{self._instance}") from None
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(self._fd)
            raise storage_error(error, f"write {self._path}") from error
        for directory in self._own:
            remove_unfinished(directory)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)
