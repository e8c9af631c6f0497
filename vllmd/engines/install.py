"""`vllmctl engine install`: an engine in a virtual environment of its own, built aside, published by renames.

    <engines>/.building-XXXX/       being built; swept by the next installation when it was interrupted
    <engines>/vllm-0.32.0-cpu/      complete (it has a record), never changed again
    <engines>/current               link to the chosen one, replaced by one rename (choice.py)
    <engines>/previous              link to the one before

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

from vllmd.engines import build, choice, locks, packages, record
from vllmd.errors import ConfigError, TryLater, UsageError

DEFAULT_VERSION = "0.32.0"
_BUILDING = ".building-"
REMOVING = ".removing-"

Say = Callable[[str], None]
Accept = Callable[[record.Record], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to install. `variant` is cpu, cuda or rocm; `wheels` a directory of wheels to use instead of any index, or None;
    `index_url` an index instead of the configured one; `lock` a file of requirements with hashes, nothing else is installed
    then; `py_spy` is auto (if it can be had), yes or no; `use` whether it becomes the chosen one."""

    version: str = DEFAULT_VERSION
    variant: str = "cpu"
    python: str = ""
    wheels: Path | None = None
    reinstall: bool = False
    index_url: str = ""
    lock: Path | None = None
    py_spy: str = "auto"
    use: bool = True


def has_nvidia_driver() -> bool:
    if Path("/proc/driver/nvidia/version").exists():
        return True
    libraries = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
    return shutil.which("nvidia-smi") is not None or any(Path(at, "libcuda.so.1").exists() for at in libraries)


def install(engines: Path, request: Request, say: Say, accept: Accept = lambda _record: None) -> Path:
    """Installs and chooses; returns the engine's directory. An engine that is there already is only chosen.

    `accept` gets the record of an engine before it is published or chosen, and raises where it does not fit this host.
    Raises UsageError on a request that cannot be met, ConfigError when no Python fits, EngineFailed when the build fails,
    TryLater when another installation runs. Whatever happens before the last rename, KeyboardInterrupt included, leaves
    the engines directory as it was.
    """
    lock = _refuse(request)
    with _readable_by_all():
        try:
            engines.mkdir(parents=True, exist_ok=True, mode=0o755)
        except OSError as error:
            raise ConfigError(
                "engines_not_writable", f"{engines}: {error.strerror}", "run this as root, or with --user"
            ) from error
        with choice.explained(f"install an engine in {engines}"), only_one(engines):
            sweep(engines, say)
            name = f"vllm-{request.version}-{request.variant}"
            known = record.read(engines / name)
            if known is None or request.reinstall or _differs(known, lock, name):
                name = _built(engines, name, request, lock, accept, say)
            else:
                accept(known)
            if request.use:
                choice.choose(engines, name)
    said = f"{name} is the engine now ({engines / record.CURRENT})" if request.use else f"{name} is installed; `vllmctl engine use {name}` chooses it"
    say(said)
    return engines / name


def _differs(known: record.Record, lock: locks.Lock | None, name: str) -> bool:
    """An engine that was made from other requirements is not what was asked for, although its name is."""
    if lock is None or known.lock == lock.sha256:
        return False
    raise UsageError("engine_differs", f"{name} is installed, and was not made from {lock.path}", "--reinstall makes another one beside it")


def _refuse(request: Request) -> locks.Lock | None:
    """What is wrong with a request is said before anything is made; the lock file, parsed."""
    if not re.fullmatch(r"[0-9][0-9A-Za-z.+!-]*", request.version):
        raise UsageError("bad_version", f"not a version: {request.version!r}", "for example: --version 0.32.0")
    if request.wheels is not None and not request.wheels.is_dir():
        raise UsageError("bad_wheels", f"--wheels {request.wheels} is no directory", "give the directory of the wheels")
    if request.wheels is not None and request.index_url:
        raise UsageError("bad_wheels", "--wheels asks no index, so --index-url has no meaning with it", "give one of them")
    if request.index_url and not re.fullmatch(r"(https?|file)://\S+", request.index_url):
        raise UsageError("bad_index", "--index-url is no address of an index", "as in --index-url https://HOST/simple")
    if request.variant == "rocm" and request.wheels is None and not request.index_url:
        what = "vLLM's builds for AMD GPUs are not on the default index"
        raise UsageError("bad_index", what, "give their index with --index-url, or their wheels with --wheels")
    if request.python and not build.fits(request.python):
        what = f"--python {request.python} is no Python 3.10 to 3.13 with the venv module"
        raise UsageError("bad_python", what, "leave it out to take the system's")
    return None if request.lock is None else locks.read(request.lock, build.package(request.variant), request.version)


@contextlib.contextmanager
def _readable_by_all() -> Iterator[None]:
    """With root's umask at 077, as on hardened hosts, the service's account could not execute what is installed here."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


def _built(engines: Path, name: str, request: Request, lock: locks.Lock | None, accept: Accept, say: Say) -> str:
    python = request.python or build.suitable_python(say)
    recipe = build.Recipe(request.version, request.variant, python, request.wheels, request.index_url, lock, request.py_spy)
    building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=engines))
    try:
        building.chmod(0o755)  # mkdtemp's 0700 would lock the service account out
        known = build.environment(building, recipe, say)
        accept(known)
        packages.seal(building)
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


def sweep(engines: Path, say: Say) -> None:
    """Whoever holds the lock knows that nobody else is building or removing: these are of commands that were killed."""
    for prefix, what in ((_BUILDING, "an installation"), (REMOVING, "a removal")):
        for leftover in engines.glob(f"{prefix}*"):
            say(f"removing {leftover.name}, left by {what} that was interrupted")
            shutil.rmtree(leftover, ignore_errors=True)
    choice.sweep_links(engines)


@contextlib.contextmanager
def only_one(engines: Path) -> Iterator[None]:
    """The lock of all that changes the engines of a host. TryLater; OSError."""
    descriptor = os.open(engines / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise TryLater(
            "engine_install_runs", f"another `vllmctl engine` works in {engines}", "wait until it has ended"
        ) from None
    finally:
        os.close(descriptor)
