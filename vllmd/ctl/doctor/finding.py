"""What a check says: a finding with the command that mends it, or that it could not look."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]
_PROGRAMS = "vllmctl|systemctl|nvidia-smi|chmod|chgrp|chown|modprobe|usermod|mount"
_QUOTED = re.compile(rf"`((?:{_PROGRAMS}) [^`]*)`")
_TRAILING = re.compile(r": (chmod \S+ \S+)$")
_PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|\.\.\.")


@dataclass(frozen=True, slots=True)
class Finding:
    """`check` is a stable word. `mend` is a command for a shell of root ('' where no command can); `asks` what it reads from its
    standard input. `severity`: an error keeps something from working, a warning will, or makes it worse than it could be."""

    check: str
    where: str
    what: str
    mend: str = ""
    note: str = ""
    instance: str = ""
    severity: Severity = "error"
    asks: str = ""


@dataclass(frozen=True, slots=True)
class Unseen:
    """What could not be looked at, and why."""

    what: str
    why: str


def command(*words: str) -> str:
    """The words as a shell takes them."""
    return shlex.join(words)


def command_in(hint: str) -> str:
    """The command that a hint of ours names, if it can be typed as it stands."""
    found = _QUOTED.search(hint)
    return found[1] if found and not _PLACEHOLDER.search(found[1]) else ""


def split_advice(text: str) -> tuple[str, str]:
    """A warning of the configuration, and the command at its end."""
    found = _TRAILING.search(text)
    return (text[: found.start()], found[1]) if found else (text, "")
