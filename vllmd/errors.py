"""Every expected failure, as one tree: a code, what happened, what to do, and the exit status that systemd sees.

    VllmdError
    ├── UsageError          64  wrong command line
    ├── ModelInvalid        65  the model is there but is not valid
    ├── ModelNotFound       66  no source has the model
    │   └── SourceUnavailable   it could not be asked, or did not give what it offered: worth asking again
    ├── GpuUnavailable      69  a GPU is lost or gated: a person must act
    ├── EngineFailed        70  the engine died
    ├── StorageFailed       74  disk full or storage failing
    ├── TryLater            75  hung, deadline passed, lock held, memory not back
    ├── PermissionMissing   77  a device, directory or credential may not be used
    ├── ConfigError         78  bad configuration
    └── PortRefused      2 to 5  preflight's stable contract

Raised anywhere, turned into two lines and an exit status only in commandline.py. An exception outside this tree is
a bug of ours: it keeps its traceback and exits 70.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Any


class Status(IntEnum):
    """Exit statuses of `vllmd run` (README.md has the table for users)."""

    OK = 0
    PORT_FOREIGN = 2
    PORT_OTHER_USER = 3
    PORT_UNKNOWN = 4
    PORT_STILL_HELD = 5
    USAGE = 64
    DATAERR = 65
    NOINPUT = 66
    UNAVAILABLE = 69
    SOFTWARE = 70
    IOERR = 74
    TEMPFAIL = 75
    NOPERM = 77
    CONFIG = 78


class VllmdError(Exception):
    """An expected failure.

    `code` is a stable lower-case word with underscores that programs match on (`port_in_use`); `what` one line for a
    person, with the place in it; `hint` what to do about it, a command where there is one; `status` the exit status.
    """

    status: Status = Status.SOFTWARE
    more: Mapping[str, Any] = MappingProxyType({})
    """What last.json says beside it, for those who look closer."""

    def __init__(self, code: str, what: str, hint: str = "", *, status: Status | None = None) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.hint = hint
        if status is not None:
            self.status = status

    def as_dict(self) -> dict[str, object]:
        return {"code": self.code, "what": self.what, "hint": self.hint, "status": int(self.status)}


class UsageError(VllmdError):
    status = Status.USAGE


class ModelInvalid(VllmdError):
    status = Status.DATAERR


class ModelNotFound(VllmdError):
    status = Status.NOINPUT


class SourceUnavailable(ModelNotFound):
    """A network, a server or a limit of its, not the model, was at fault: the resolve stage asks again (never for a refusal)."""


class GpuUnavailable(VllmdError):
    status = Status.UNAVAILABLE


class EngineFailed(VllmdError):
    status = Status.SOFTWARE


class StorageFailed(VllmdError):
    status = Status.IOERR


class TryLater(VllmdError):
    status = Status.TEMPFAIL


class PermissionMissing(VllmdError):
    status = Status.NOPERM


class ConfigError(VllmdError):
    status = Status.CONFIG


class PortRefused(VllmdError):
    """Preflight's verdict on a port that is not ours to take; the status (2 to 5) is always given."""

    status = Status.PORT_FOREIGN
