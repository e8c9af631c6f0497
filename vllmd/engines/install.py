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
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllmd.engines import build, record
from vllmd.errors import ConfigError, PermissionMissing, TryLater, UsageError
from vllmd.system.files import storage_error

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
    try:
        return os.readlink(engines / record.CURRENT)  # noqa: PTH115 - the text of the link is wanted, whatever it points to
    except OSError:
        return ""


def install(engines: Path, request: Request, say: Say) -> Path:
    """Installs and chooses; returns the engine's directory. An engine that is there already is only chosen.

    Raises UsageError on a request that cannot be met, ConfigError when no Python fits, EngineFailed when the build fails,
    TryLater when another installation runs. Whatever happens before the last rename, KeyboardInterrupt included, leaves
    the engines directory as it was.
    """
    _refuse(request)
    with _readable_by_all():
        try:
            engines.mkdir(parents=True, exist_ok=True, mode=0o755)
        except OSError as error:
            raise ConfigError(
                "engines_not_writable", f"{engines}: {error.strerror}", "run this as root, or with --user"
            ) from error
        with _explained(f"install an engine in {engines}"), _only_one(engines):
            _sweep(engines, say)
            name = f"vllm-{request.version}-{request.variant}"
            if record.read(engines / name) is None or request.reinstall:
                name = _built(engines, name, request, say)
            choose(engines, name)
    say(f"{name} is the engine now ({engines / record.CURRENT})")
    return engines / name


def _refuse(request: Request) -> None:
    """What is wrong with a request is said before anything is made."""
    if not re.fullmatch(r"[0-9][0-9A-Za-z.+!-]*", request.version):
        raise UsageError("bad_version", f"not a version: {request.version!r}", "for example: --version 0.32.0")
    if request.wheels is not None and not request.wheels.is_dir():
        raise UsageError("bad_wheels", f"--wheels {request.wheels} is no directory", "give the directory of the wheels")
    if request.python and not build.fits(request.python):
        what = f"--python {request.python} is no Python 3.10 to 3.13 with the venv module"
        raise UsageError("bad_python", what, "leave it out to take the system's")


@contextlib.contextmanager
def _readable_by_all() -> Iterator[None]:
    """With root's umask at 077, as on hardened hosts, the service's account could not execute what is installed here."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, f"{what} ({error.filename})" if error.filename else what) from error


def choose(engines: Path, name: str) -> None:
    """Points `current` at an engine, by one rename: readers see the old one or the new one. `current` itself is none:
    a link to itself would leave every instance without an engine."""
    if "/" in name or name.startswith(".") or (engines / name).is_symlink() or record.read(engines / name) is None:
        raise UsageError(
            "engine_unknown", f"no engine {name} in {engines}", "`vllmctl engine list` shows what is installed"
        )
    aside = engines / f".{record.CURRENT}-{os.getpid()}"
    with _explained(f"choose {name}"):
        try:
            aside.unlink(missing_ok=True)
            aside.symlink_to(name)
            aside.replace(engines / record.CURRENT)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
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
