"""Root runs what it installs: pip, and the vLLM that is asked for its options. So nothing of it may be what the service's account wrote."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from vllmd.config.paths import Paths
from vllmd.engines.install import Request
from vllmd.errors import UsageError

_FILE = "file://"


def refuse(paths: Paths, request: Request) -> None:
    """UsageError where root would run what the service's account, or everybody, could have put there."""
    if os.geteuid() != 0:
        return
    service = _service(paths)
    for what, path in _used(paths, request):
        culprit = _writable_at(path, service)
        if culprit:
            raise UsageError("not_roots_own", f"{what} {path}: {culprit}, and root would run what lies there", f"`chown root` it, or copy it to where only root writes ({culprit.partition(' ')[0]})")


def _service(paths: Paths) -> int:
    """The service's uid; 0 where there is none yet."""
    try:
        return paths.state.stat().st_uid
    except OSError:
        return 0


def _used(paths: Paths, request: Request) -> Iterator[tuple[str, Path]]:
    yield "the engines' directory", paths.engines
    if request.python:
        yield "--python", Path(shutil.which(request.python) or request.python)
    if request.lock is not None:
        yield "--lock", request.lock
    if request.index_url.startswith(_FILE):
        yield "--index-url", Path(request.index_url.removeprefix(_FILE))
    if request.wheels is not None:
        yield "--wheels", request.wheels
        for each in sorted(request.wheels.iterdir()) if request.wheels.is_dir() else ():
            yield "--wheels", each


def _writable_at(path: Path, service: int) -> str:
    """Where on the way to `path`, or to what links on it show, another one has his hand in it; '' where nobody has."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow the links, which are to be looked at
    for way in dict.fromkeys((absolute, Path(os.path.realpath(absolute)))):
        for place in (*reversed(way.parents), way):
            try:
                about = place.lstat()
            except OSError:
                break
            if service and about.st_uid == service:
                return f"{place} belongs to the service's account"
            if stat.S_ISLNK(about.st_mode) or not about.st_mode & stat.S_IWOTH:
                continue
            # In /tmp everybody can make what is not there yet, but not replace what is.
            if not about.st_mode & stat.S_ISVTX or place == way:
                return f"{place} can be written by everybody"
    return ""
