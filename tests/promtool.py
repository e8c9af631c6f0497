"""promtool, which judges expositions, rules and queries: the host's own, or Debian's package unpacked into the cache.

`python -m tests.promtool` fetches it. Installing the package would start Prometheus as a service; unpacking changes nothing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from tests.needs import need
from tests.system.tree import cache_directory

_TIMEOUT_S = 240


def promtool() -> str:
    """Its path; fetched if it is missing. Skips the test where it cannot be had."""
    found = shutil.which("promtool") or _unpacked() or _fetch()
    need(bool(found), "promtool (apt-get install prometheus, or apt-get update: it is fetched then)")
    return found


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """promtool with these arguments, its complaints in stdout."""
    return subprocess.run(
        [promtool(), *arguments], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )


def _home() -> Path:
    return cache_directory() / "prometheus"


def _unpacked() -> str:
    program = _home() / "usr/bin/promtool"
    return str(program) if program.is_file() else ""


def _fetch() -> str:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return ""
    home = _home()
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_name(f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _unpacked() or _unpack(home)


def _unpack(home: Path) -> str:
    new = home.with_name(f"{home.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    package = _download(new) or (_update() and _download(new)) or None
    if package is not None:
        subprocess.run(["dpkg-deb", "-x", str(package), str(new)], check=True, timeout=_TIMEOUT_S)
        package.unlink()
        (new / "usr/bin/prometheus").unlink(missing_ok=True)  # 110 MB that nobody asks
        shutil.rmtree(home, ignore_errors=True)
        new.rename(home)
    shutil.rmtree(new, ignore_errors=True)
    return _unpacked()


def _download(folder: Path) -> Path | None:
    _quiet("apt-get", "-qq", "download", "prometheus", folder=folder)
    return next(folder.glob("prometheus_*.deb"), None)


def _update() -> bool:
    """A fresh machine has no lists yet; only root can have them made."""
    return os.geteuid() == 0 and _quiet("apt-get", "-qq", "update")


def _quiet(*argv: str, folder: Path | None = None) -> bool:
    try:
        return subprocess.run(argv, cwd=folder, capture_output=True, timeout=_TIMEOUT_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


if __name__ == "__main__":
    print(shutil.which("promtool") or _unpacked() or _fetch() or "promtool could not be fetched: its tests are skipped")
