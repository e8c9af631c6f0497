"""Secrets out of everything that is printed, logged or kept: command lines, text, environments.

Two nets: the values that are known to be secret, wherever they stand, and the places where secrets usually stand
(flags, headers, names of variables), for those that nobody told us of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

from vllmd.config.given import REDACTED

SHORTEST_IN_WORDS = 4

_SECRET_FLAGS = (
    r"api[-_]?key|token|access[-_]token|api[-_]token|auth|authorization|password|passwd|secret|jwt|bearer"
    r"|[a-z0-9_-]*[-_](api[-_]?key|token|password|secret|secret[-_]key)"
)
_FLAG = re.compile(rf"--?({_SECRET_FLAGS})", re.IGNORECASE)
_LIST_FLAG = re.compile(r"--?api[-_]?key", re.IGNORECASE)
_HEADER_NAME = r"authorization|proxy-authorization|cookie|set-cookie|x-api-key|api-key|[a-z0-9_-]*(?:bearer|token|apikey)[a-z0-9_-]*"
_HEADER = re.compile(rf"(?P<name>{_HEADER_NAME})\s*:\s*(?P<value>\S.*)", re.IGNORECASE | re.DOTALL)
_SECRET_NAME = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|JWT|BEARER|COOKIE)(_|$)", re.IGNORECASE)
_KEY_FILES = re.compile(r"_(FILE|PATH|DIR)$", re.IGNORECASE)

_IN_TEXT = (
    re.compile(r"(?P<keep>\b(?:authorization|proxy-authorization|cookie|set-cookie|x-api-key|api-key)['\"]?\s*[:=]\s*)[^\r\n]+", re.IGNORECASE),
    re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{4,}", re.IGNORECASE),
    re.compile(rf"(?P<keep>(?<![\w-])--?(?:{_SECRET_FLAGS})(?:\s*=\s*|\s+))(?!-)(?:'[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE),
    re.compile(r"(?P<keep>[a-z][a-z0-9+.-]*://)[^/\s:@]+:[^/\s@]+(?=@)", re.IGNORECASE),
    re.compile(r"(?P<keep>)\bhf_[A-Za-z0-9]{16,}\b"),
)


def _forms(secret: str) -> set[str]:
    """The spellings in which a value turns up: as it is, in JSON, in a URL."""
    return {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], quote(secret), quote(secret, safe="")}


def _known(secrets: Iterable[str]) -> re.Pattern[str] | None:
    forms = {form for secret in secrets if secret for form in _forms(secret)}
    # A very short secret is replaced only where it stands alone: 'a' would turn every message into noise.
    parts = [re.escape(form) if len(form) >= SHORTEST_IN_WORDS else rf"(?<!\w){re.escape(form)}(?!\w)" for form in sorted(forms, key=len, reverse=True)]
    return re.compile("|".join(parts)) if parts else None


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with known secrets, and what stands where secrets stand, replaced."""
    known = _known(secrets)
    if known is not None:
        text = known.sub(REDACTED, text)
    for pattern in _IN_TEXT:
        text = pattern.sub(lambda match: match["keep"] + REDACTED, text)
    return text


def redact_argv(argv: Sequence[str], secrets: Iterable[str] = ()) -> tuple[str, ...]:
    """A command line fit for printing: `--flag VALUE` and `--flag=VALUE` of secret flags, headers, and known values."""
    secrets = tuple(secrets)
    shown: list[str] = []
    hide = ""
    for item in argv:
        flag, equals, _value = item.partition("=")
        if hide and not item.startswith("--"):
            shown.append(REDACTED)
            hide = hide if _LIST_FLAG.fullmatch(hide) else ""
        elif _FLAG.fullmatch(flag):
            shown.append(f"{flag}={REDACTED}" if equals else flag)
            # --api-key takes several values.
            hide = flag if not equals or _LIST_FLAG.fullmatch(flag) else ""
        else:
            shown.append(_item(item, secrets))
            hide = ""
    return tuple(shown)


def _item(item: str, secrets: tuple[str, ...]) -> str:
    start, equals, value = item.partition("=") if item.startswith("-") else ("", "", item)
    header = _HEADER.fullmatch(value)
    if header:
        return f"{start}{equals}{header['name']}: {REDACTED}"
    return redact_text(item, secrets)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name usually holds a secret (VLLM_API_KEY does; SSL_KEY_FILE names a file)."""
    return bool(_SECRET_NAME.search(name)) and not _KEY_FILES.search(name)


def redact_environment(environ: Mapping[str, str], secrets: Iterable[str] = ()) -> dict[str, str]:
    secrets = tuple(secrets)
    return {name: REDACTED if value and is_secret_name(name) else redact_text(value, secrets) for name, value in environ.items()}
