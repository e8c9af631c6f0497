"""last.json: why the instance last ended. Written and fsynced before the exit, since the runtime directory does not outlive it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllmd.config.redact import redact_tree
from vllmd.core.events import Failure
from vllmd.errors import Status, VllmdError
from vllmd.instance.board import describe_failure, now_text
from vllmd.system.files import exhausted, write_atomic
from vllmd.system.journal import Journal
from vllmd.system.terminal import Stderr

SCHEMA = 1


def failure_of(error: VllmdError) -> Failure:
    return Failure(error.code, error.what, error.hint, int(error.status))


def bug(error: BaseException) -> Failure:
    """An exception of ours that nobody expected; its traceback goes to the journal."""
    what = f"vllmd itself failed: {type(error).__name__}: {error}"
    return Failure("internal_error", what, "this is a bug; the journal has the traceback", int(Status.SOFTWARE))


def unexpected(error: Exception, journal: Journal | Stderr) -> Failure:
    """What an exception outside of our tree says: a host that gives nothing more is no bug, and needs no traceback."""
    refused = exhausted(error, "the host gives no more")
    if refused is not None:
        return failure_of(refused)
    journal.event("failed", "".join(traceback.format_exception(error)), priority=2)
    return bug(error)


def write_last(
    directory: Path, instance: str, status: int, failure: Failure | None, *, redact: Callable[[str], str] = str, launch_id: str = "", **more: Any
) -> str:
    """Writes instances/NAME/last.json; returns '' or why it could not be written (the exit goes on all the same)."""
    document = {
        "schema": SCHEMA,
        "instance": instance,
        "at": now_text(),
        "launch_id": launch_id,
        "status": status,
        "error": describe_failure(failure),
        **more,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / "last.json", json.dumps(redact_tree(document, redact), ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        return f"cannot write {directory / 'last.json'}: {error.strerror}"
    return ""
