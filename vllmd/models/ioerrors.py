"""From what the file system says of a model to what a person can do; a failing disk is left to system.files."""

from __future__ import annotations

import errno
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager

from vllmd.errors import ModelInvalid, PermissionMissing, VllmdError
from vllmd.system.files import storage_error

_CONTENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
"""These say something of the model's directory, not of the machine: a file vanished, or a link leads nowhere."""


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def translated(error: OSError, what: str) -> VllmdError:
    """The error of our tree for `error`, met while doing `what` ('read /x')."""
    path = error.filename if isinstance(error.filename, str) else what
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM):
        user = user_name()
        hint = f"Give {user} access: every directory above it needs x, a file r, the model store also w."
        return PermissionMissing("model_not_permitted", f"{path}: {reason} for user {user}", hint)
    if error.errno in _CONTENT:
        return ModelInvalid("model_unreadable", f"{path}: {reason}", "Put the model there again.")
    return storage_error(error, what if path in what else f"{what} ({path})")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what the file system says while doing `what` into an error of our tree."""
    try:
        yield
    except OSError as error:
        raise translated(error, what) from error
