"""The last step of `vllm-serve` and `vllmd serve`: this process becomes the engine."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from vllmd.config.redact import redact_argv
from vllmd.core.plan import Command
from vllmd.errors import PermissionMissing, UsageError


def execute(command: Command, *, print_cmd: bool, dry_run: bool) -> int:
    """Does not return, save for a dry run (0). `print_cmd` writes the line `CMD: ...` to stderr first, without secrets.
    PermissionMissing where a private file cannot be written, UsageError where the program cannot be executed."""
    if print_cmd or dry_run:
        sys.stderr.write(f"CMD: {shlex.join(redact_argv(command.argv, command.secrets))}\n")
    if dry_run:
        return 0
    for path, content in command.private_files.items():
        _write_private(Path(path), content)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(command.argv[0], command.argv, dict(command.env))
    except OSError as error:
        raise UsageError(
            "engine_not_executable", f"{command.argv[0]}: {error.strerror}", "`vllmctl engine install --reinstall`"
        ) from error


def _write_private(path: Path, content: str) -> None:
    """0600 from its first byte on, never through a link."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(content)
    except OSError as error:
        raise PermissionMissing(
            "not_writable", f"{path}: {error.strerror}", "give this user the runtime directory"
        ) from error
