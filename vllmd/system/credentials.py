"""The secrets that a process was given beside its configuration: systemd's credentials, and variables named like secrets.

Read so that they can be taken out of what is told: an engine runs as our user, so it can find them, and print them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllmd.config.redact import is_secret_name
from vllmd.system.files import read_small

DIRECTORY = "CREDENTIALS_DIRECTORY"
SHORTEST = 6
"""Shorter than any key that is one: `true` in a variable named like a secret would be taken out of every sentence."""
_LIMIT_BYTES = 64 << 10
_FILES = 32


def is_secret(name: str) -> bool:
    """Whether the value of a variable usually is a secret."""
    return name != DIRECTORY and is_secret_name(name)


def secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Every value, longest first. What cannot be read is left out: whoever needs it says so."""
    found = {*_of_credentials(environ), *(value for name, value in environ.items() if is_secret(name))}
    return tuple(sorted((value for value in found if len(value) >= SHORTEST), key=lambda value: (-len(value), value)))


def _of_credentials(environ: Mapping[str, str]) -> Iterator[str]:
    directory = environ.get(DIRECTORY, "")
    if not directory:
        return
    try:
        names = sorted(os.listdir(directory))[:_FILES]  # noqa: PTH208
    except OSError:
        return
    for name in names:
        try:
            text = read_small(Path(directory, name), _LIMIT_BYTES).decode(errors="replace")
        except OSError:
            continue
        yield from _values(text)


def _values(text: str) -> Iterator[str]:
    """A file is one secret, or lines of NAME = SECRET in the manner of ~/.aws/credentials."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if len(lines) == 1:
        yield lines[0]
        return
    for line in lines:
        name, equals, value = line.partition("=")
        if not equals:
            yield line if not line.startswith(("[", "#", ";")) else ""
        elif is_secret_name(name.strip()):
            yield value.strip()
