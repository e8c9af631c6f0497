"""The token for the hub: where it may lie, in order, and whether it may be sent."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from vllmd.config.settings import Model
from vllmd.errors import ConfigError, PermissionMissing
from vllmd.system.files import read_small

CREDENTIAL = "hf-token"
MAX_BYTES = 8192
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True, slots=True)
class Token:
    """`origin` is for messages; both are '' where there is no token."""

    value: str = field(default="", repr=False)
    origin: str = ""


def find(settings: Model, environ: Mapping[str, str]) -> Token:
    """The first that is there: the systemd credential, the setting, then what the hub's own tools stored.

    ConfigError for one with characters that no header takes; PermissionMissing where a file that was meant cannot be read.
    """
    for token in _tokens(settings, environ):
        if token.value and not _TOKEN.fullmatch(token.value):
            hint = "A token is one line of letters, digits and signs (hf_...), without spaces or quotes around it."
            raise ConfigError("hub_token", f"the token from {token.origin} has a line break, a space or other characters that no token has", hint)
        if token.value:
            return token
    return Token()


def _tokens(settings: Model, environ: Mapping[str, str]) -> Iterator[Token]:
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    if directory:
        yield _of_file(Path(directory, CREDENTIAL), f"the systemd credential {CREDENTIAL}", is_meant=True)
    yield Token(settings.hf_token.strip(), "HF_TOKEN")
    if environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _TRUE:
        return
    yield Token(environ.get("HUGGING_FACE_HUB_TOKEN", "").strip(), "HUGGING_FACE_HUB_TOKEN")
    for path, is_meant in _stored(environ):
        yield _of_file(path, str(path), is_meant=is_meant)


def _stored(environ: Mapping[str, str]) -> Iterator[tuple[Path, bool]]:
    """Where the hub's tools keep it. Only a path that somebody wrote as HF_TOKEN_PATH is meant for sure."""
    if environ.get("HF_TOKEN_PATH"):
        yield Path(environ["HF_TOKEN_PATH"]).expanduser(), True
        return
    for name, tail in (("HF_HOME", "token"), ("XDG_CACHE_HOME", "huggingface/token"), ("HOME", ".cache/huggingface/token")):
        if environ.get(name):
            yield Path(environ[name], tail), False
            return


def _of_file(path: Path, origin: str, *, is_meant: bool) -> Token:
    """systemd gives regular files; a stored token may be a link, as in a mounted secret."""
    if not path.is_absolute():
        return Token()
    try:
        content = read_small(Path(os.path.realpath(path)), MAX_BYTES)
    except OSError as error:
        if not is_meant or error.errno in (errno.ENOENT, errno.ENOTDIR):
            return Token()
        raise PermissionMissing("hub_token", f"{path}: {error.strerror}", "It should be a readable file with the token for the hub.") from error
    return Token(content.decode("utf-8", "replace").strip(), origin)


def is_clear_text(endpoint: str) -> bool:
    """Whether a token sent there could be read by anybody on the way: plain http to another host.

    Such a token is left out rather than the endpoint refused: a mirror on a private network mostly needs none, and HF_TOKEN
    may be set on the whole machine for another purpose.
    """
    parts = urlsplit(endpoint)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return False
    try:
        return not ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return True
