"""Which engine of those that are installed: the chosen one, the one before it, the one that an instance is pinned to.

`current` and `previous` are links beside the engines. The switch is one rename and so is the way back (the two links change
places): a reader sees the one or the other, whatever happens in between.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vllmd.engines import record
from vllmd.errors import ConfigError, PermissionMissing, UsageError
from vllmd.system.files import storage_error

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def installed_engines(engines: Path) -> list[tuple[str, record.Record]]:
    """Complete engines by directory name. PermissionMissing where this user may not look."""
    try:
        names = sorted(entry.name for entry in os.scandir(engines) if not entry.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise PermissionMissing("engines_unreadable", f"{engines}: {error.strerror}", f"chmod a+rx {engines}") from None
    found = ((name, record.read(engines / name)) for name in names if not name.startswith("."))
    return [(name, known) for name, known in found if known is not None]


def current_name(engines: Path) -> str:
    """Directory name of the chosen engine; '' where none is chosen."""
    return _target(engines / record.CURRENT)


def previous_name(engines: Path) -> str:
    """Directory name of the engine that was chosen before; '' where there is no way back."""
    found = _target(engines / record.PREVIOUS)
    return found if found != current_name(engines) and _is_engine(engines, found) else ""


def _target(link: Path) -> str:
    try:
        return os.readlink(link)  # noqa: PTH115 - the text of the link is wanted, whatever it points to
    except OSError:
        return ""


def _is_engine(engines: Path, name: str) -> bool:
    """`current` itself is none: a link to itself would leave every instance without an engine."""
    if not name or "/" in name or name.startswith(".") or (engines / name).is_symlink():
        return False
    return record.read(engines / name) is not None


def require(engines: Path, name: str) -> record.Record:
    """The record of an engine by its directory name. UsageError where there is none."""
    known = record.read(engines / name) if _is_engine(engines, name) else None
    if known is None:
        raise UsageError("engine_unknown", f"no engine {name} in {engines}", "`vllmctl engine list` shows what is installed")
    return known


def choose(engines: Path, name: str) -> None:
    """Points `current` at an engine by one rename, and remembers the one before."""
    require(engines, name)
    before = current_name(engines)
    with explained(f"choose {name}"):
        if before and before != name:
            _link(engines, record.PREVIOUS, before)
        _link(engines, record.CURRENT, name)
        sync_directory(engines)


def rollback(engines: Path) -> str:
    """The engine before becomes the chosen one again, and the other way round. UsageError where there is none."""
    name = previous_name(engines)
    if not name:
        raise UsageError("no_previous_engine", f"no engine in {engines} was chosen before this one", "`vllmctl engine use NAME` chooses any that is installed")
    before = current_name(engines)
    with explained(f"go back to {name}"):
        if not _exchanged(engines / record.CURRENT, engines / record.PREVIOUS):
            _link(engines, record.CURRENT, name)
            _link(engines, record.PREVIOUS, before)
        sync_directory(engines)
    return name


def _exchanged(one: Path, other: Path) -> bool:
    """Both names change places at once; False where the kernel or the file system cannot."""
    import ctypes  # every start reads the links; few commands exchange them

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _link(engines: Path, link: str, name: str) -> None:
    aside = engines / f".{link}-{os.getpid()}"
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(name)
        aside.replace(engines / link)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sweep_links(engines: Path) -> None:
    for name in (record.CURRENT, record.PREVIOUS):
        for leftover in engines.glob(f".{name}-*"):
            leftover.unlink(missing_ok=True)


def pinned(engines: Path, wanted: str) -> str:
    """Directory name of what `engine.version` names: a directory, or a version. Of several builds of one version the chosen
    one, else the newest of the same variant. ConfigError."""
    found = dict(installed_engines(engines))
    if wanted in found:
        return wanted
    builds = {name: known for name, known in found.items() if known.version == wanted}
    if (chosen := current_name(engines)) in builds:
        return chosen
    variants = {known.variant for known in builds.values()}
    if len(variants) == 1:
        return max(builds, key=_number)
    if not builds:
        known = ", ".join(found) or "none"
        raise ConfigError("engine_missing", f"the engine {wanted!r} is not installed in {engines} (there: {known})", f"`vllmctl engine install --version {wanted} --no-use`")
    raise ConfigError("engine_ambiguous", f"several engines are {wanted}: {', '.join(builds)}", "name one of them whole")


def _number(name: str) -> tuple[int, str]:
    """vllm-0.32.0-cpu, .2, .3: built anew later."""
    _, _, last = name.rpartition(".")
    return (int(last) if last.isdigit() else 1, name)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, f"{what} ({error.filename})" if error.filename else what) from error


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
