"""The child that resolves and verifies a model for the daemon: `python -m vllmd.models.fetch`, speaking models/wire.

Hashing takes minutes, and a dead network file system blocks for ever: neither may happen inside the daemon. The daemon
holds this process by its stdin: when that closes, because the daemon ended in whatever way, the child ends at once.
"""

from __future__ import annotations

import os
import sys
import threading

from vllmd.errors import UsageError, VllmdError
from vllmd.models import wire
from vllmd.models.resolve import resolve_patiently
from vllmd.system.priority import as_others


def main() -> int:
    as_others()
    os.umask(0o022)  # models are no secrets: other users may read what the unit's umask would keep from them
    line = sys.stdin.buffer.readline(wire.MAX_REQUEST_BYTES)
    if not line.endswith(b"\n"):
        return 0  # the daemon ended before it asked
    threading.Thread(target=_end_with_daemon, daemon=True).start()
    try:
        _serve(line)
    except VllmdError as error:
        _emit(wire.Failed(error))
        return int(error.status)
    return 0


def _serve(line: bytes) -> None:
    try:
        request, settings = wire.decode_request(line)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError("bad_request", f"no request for the resolver: {error}", "It is started by vllmd, not by hand.") from error
    model = resolve_patiently(request, settings, os.environ, _emit)
    _emit(wire.Resolved(model))
    from vllmd.models.verify import verify  # not before the engine may start

    _emit(wire.Verified(verify(model, request, settings, _emit) or model.manifest_sha256))


def _end_with_daemon() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


def _emit(event: wire.Event) -> None:
    try:
        os.write(sys.stdout.fileno(), wire.encode_event(event))
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
