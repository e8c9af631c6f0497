"""Whether something is there, without taking 'may not look' for 'is not there': pathlib and os.path answer False to both,
which of them depends on the Python, and then a missing permission would be reported as a missing model."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def present(path: Path) -> bool:
    """Whether the name exists, be it a dangling link. OSError where that cannot be known."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_directory(path: Path) -> bool:
    """Whether it is a directory, or a link to one. OSError where that cannot be known."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_real_directory(path: Path) -> bool:
    """Whether it is a directory and no link."""
    return is_directory(path) and not path.is_symlink()
