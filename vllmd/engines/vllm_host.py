"""What an installed engine needs of the host below it, looked at without running it: its Python, its libraries.

vLLM tells neither. After an upgrade of the distribution it says "No module named 'vllm'"; without libnuma its CPU build
goes on for 25 s and ends with "'_OpNamespace' '_C' object has no attribute 'init_cpu_memory_env'".
"""

from __future__ import annotations

import re
from pathlib import Path

from vllmd.engines.protocol import Context
from vllmd.errors import ConfigError

_NUMA = "libnuma.so.1"
_SEARCH_PATH = "LD_LIBRARY_PATH"


def refuse_unfit(context: Context) -> None:
    """ConfigError where the engine cannot start on this host. An engine that is no virtual environment is not judged."""
    directory = Path(context.installed.executable).parent.parent
    if not (directory / "pyvenv.cfg").is_file():
        return
    _refuse_other_python(directory)
    if context.installed.variant == "cpu" and _SEARCH_PATH not in context.config.engine.env:
        _refuse_without_numa()


def _refuse_other_python(directory: Path) -> None:
    """The packages of a virtual environment belong to one minor version; its `python3` is whatever the system has now."""
    made_for = sorted(path.name for path in directory.glob("lib/python3*"))
    python = directory / "bin/python3"
    name = python.resolve().name
    if not python.exists():
        what = f"its Python is gone: there is no {python.resolve()}"
    elif made_for and re.fullmatch(r"python3\.\d+", name) and name not in made_for:
        what = f"it was made for {', '.join(made_for)}, and its bin/python3 is {name} now"
    else:
        return
    raise ConfigError("engine_python", f"the engine {directory}: {what}", "`vllmctl engine install --reinstall`")


def _refuse_without_numa() -> None:
    try:
        import ctypes

        ctypes.CDLL(_NUMA)
    except OSError:
        raise ConfigError(
            "library_missing",
            f"vLLM's CPU build needs {_NUMA}, and this host has none",
            "apt-get install libnuma1 (elsewhere: numactl-libs)",
        ) from None
