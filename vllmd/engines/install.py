"""`vllmctl engine install`: an engine in a virtual environment of its own, built aside, published by renames.

    <engines>/.building-XXXX/       being built; swept by the next installation when it was interrupted
    <engines>/vllm-0.32.0-cpu/      complete (it has a record), never changed again
    <engines>/current               link to the chosen one, replaced by one rename

A virtual environment finds itself from its `python`, wherever it lies; only the first lines of its scripts hold the
path it was made at. They are made relative, so that it can be renamed here, and bind-mounted elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllmd.engines import build, record
from vllmd.errors import ConfigError, TryLater, UsageError

DEFAULT_VERSION = "0.32.0"
_BUILDING = ".building-"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to install. `variant` is cpu or cuda; `wheels` a directory of wheels to use instead of any index, or None."""

    version: str = DEFAULT_VERSION
    variant: str = "cpu"
    python: str = ""
    wheels: Path | None = None
    reinstall: bool = False


def has_nvidia_driver() -> bool:
    if Path("/proc/driver/nvidia/version").exists():
        return True
    libraries = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
    return shutil.which("nvidia-smi") is not None or any(Path(at, "libcuda.so.1").exists() for at in libraries)


def installed_engines(engines: Path) -> list[tuple[str, record.Record]]:
    """Complete engines by directory name."""
    found = ((path.name, record.read(path)) for path in sorted(engines.glob("[!.]*")) if not path.is_symlink())
    return [(name, known) for name, known in found if known is not None]


def current_name(engines: Path) -> str:
    """Directory name of the chosen engine; '' where none is chosen."""
    try:
        return os.readlink(engines / record.CURRENT)  # noqa: PTH115 - the text of the link is wanted, whatever it points to
    except OSError:
        return ""


def install(engines: Path, request: Request, say: Say) -> Path:
    """Installs and chooses; returns the engine's directory. An engine that is there already is only chosen.

    Raises ConfigError when no Python fits, EngineFailed when the build fails, TryLater when another installation runs.
    Whatever happens before the last rename, KeyboardInterrupt included, leaves the engines directory as it was.
    """
    try:
        engines.mkdir(parents=True, exist_ok=True, mode=0o755)
    except OSError as error:
        raise ConfigError(
            "engines_not_writable", f"{engines}: {error.strerror}", "run this as root, or with --user"
        ) from error
    with _only_one(engines):
        _sweep(engines, say)
        name = f"vllm-{request.version}-{request.variant}"
        if record.read(engines / name) is None or request.reinstall:
            name = _built(engines, name, request, say)
        choose(engines, name)
    say(f"{name} is the engine now ({engines / record.CURRENT})")
    return engines / name


def choose(engines: Path, name: str) -> None:
    """Points `current` at an engine, by one rename: readers see the old one or the new one."""
    if "/" in name or record.read(engines / name) is None:
        raise UsageError(
            "engine_unknown", f"no engine {name} in {engines}", "`vllmctl engine list` shows what is installed"
        )
    aside = engines / f".{record.CURRENT}-{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()
    aside.symlink_to(name)
    aside.replace(engines / record.CURRENT)
    _sync_directory(engines)


def _built(engines: Path, name: str, request: Request, say: Say) -> str:
    python = request.python or build.suitable_python(say)
    building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=engines))
    try:
        building.chmod(0o755)  # mkdtemp's 0700 would lock the service account out
        known = build.environment(building, build.Recipe(request.version, request.variant, python, request.wheels), say)
        record.write(building, known)
        say("writing everything to the disk")
        os.sync()
        target = _free_name(engines, name)
        building.rename(engines / target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return target


def _free_name(engines: Path, name: str) -> str:
    """A reinstalled engine gets a new directory: the old one may be running."""
    number, candidate = 1, name
    while (engines / candidate).exists():
        number += 1
        candidate = f"{name}.{number}"
    return candidate


def _sweep(engines: Path, say: Say) -> None:
    """Whoever holds the lock knows that nobody else is building: these are of installations that were killed."""
    for leftover in engines.glob(f"{_BUILDING}*"):
        say(f"removing {leftover.name}, left by an installation that was interrupted")
        shutil.rmtree(leftover, ignore_errors=True)
    for link in engines.glob(f".{record.CURRENT}-*"):
        link.unlink(missing_ok=True)


@contextlib.contextmanager
def _only_one(engines: Path) -> Iterator[None]:
    descriptor = os.open(engines / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise TryLater(
            "engine_install_runs", f"another installation works in {engines}", "wait until it has ended"
        ) from None
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
