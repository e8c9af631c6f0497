"""Secrets out of everything that is printed, logged or kept: command lines, text, environments.

Two nets: the values that are known to be secret, wherever they stand, and the places where secrets usually stand
(flags, headers, names of variables), for those that nobody told us of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from vllmd.config.values import REDACTED

SHORTEST_IN_WORDS = 4

_SECRET_FLAGS = (
    r"api[-_]?key|token|access[-_]token|api[-_]token|auth|authorization|password|passwd|secret|jwt|bearer"
    r"|[a-z0-9_-]*[-_](api[-_]?key|token|password|secret|secret[-_]key)"
)
_FLAG = re.compile(rf"--?({_SECRET_FLAGS})", re.IGNORECASE)
_LIST_FLAG = re.compile(r"--?api[-_]?key", re.IGNORECASE)
_HEADER_NAME = re.compile(
    r"authorization|proxy-authorization|cookie|set-cookie|x-api-key|api-key|[a-z0-9_-]*(bearer|token|apikey)[a-z0-9_-]*", re.IGNORECASE
)
_SECRET_NAME = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|JWT|BEARER|COOKIE)(_|$)", re.IGNORECASE)
_KEY_FILES = re.compile(r"_(FILE|PATH|DIR)$", re.IGNORECASE)

_VALUE = r"(?:\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[^\s,;}\]]+)"
# Each begins where a word begins, so that a long line of one character costs one look and not one for each character.
_IN_TEXT = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<keep>(?<![\w-])(?:authorization|proxy-authorization|cookie|set-cookie|x-api-key|api-key)['\"]?\s*[:=]\s*)[^\r\n]+",
        rf"(?P<keep>(?<![\w-])(?:[a-z0-9]{{1,20}}-){{1,4}}(?:bearer|token|apikey)\s*:\s*){_VALUE}",
        rf"(?P<keep>(?<!\w)(?:api_?key|hf_token|auth_token|access_token|password|passwd|secret_key|access_key)['\"]?\s*[:=]\s*){_VALUE}",
        r"(?P<keep>\bbearer\s+)[a-z0-9._~+/=-]{8,}",
        r"(?P<keep>\bbasic\s+)(?=[a-z]*[0-9=+/])[a-z0-9+/=]{8,}",
        rf"(?P<keep>(?<![\w-])--?(?:{_SECRET_FLAGS})(?:\s*=\s*|\s+))(?!-)(?:'[^']*'|\"[^\"]*\"|\S+)",
        r"(?P<keep>(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{0,20}://)[^/\s:@]{0,200}:[^/\s@]{1,200}(?=@)",
        r"(?P<keep>[?&](?:[a-z0-9-]{0,40}[_-])?(?:token|key|apikey|secret|password|sig|signature|credential)=)[^&#\s'\"<>]+",  # addresses that are signed
        r"(?P<keep>)\bhf_[a-z0-9]{16,}\b",
    )
)


def _forms(secret: str) -> set[str]:
    """The spellings in which a value turns up: as it is, in JSON, in a URL."""
    # What an environment holds need not be UTF-8: Python then gives it as surrogates, which `quote` refuses by default.
    in_url = {quote(secret, safe, errors="surrogatepass") for safe in ("/", "")}
    return {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], *in_url}


def _known(secrets: Iterable[str]) -> re.Pattern[str] | None:
    forms = {form for secret in secrets if secret for form in _forms(secret)}
    # A very short secret is replaced only where it stands alone: 'a' would turn every message into noise.
    parts = [re.escape(form) if len(form) >= SHORTEST_IN_WORDS else rf"(?<!\w){re.escape(form)}(?!\w)" for form in sorted(forms, key=len, reverse=True)]
    return re.compile("|".join(parts)) if parts else None


@lru_cache(maxsize=64)
def knower(secrets: tuple[str, ...]) -> Callable[[str], str]:
    """A function that takes only these values out, for sentences of our own: they may explain what a key looks like."""
    known = _known(secrets)
    return (lambda text: known.sub(REDACTED, text)) if known is not None else (lambda text: text)


def redact_tree(value: Any, redact: Callable[[str], str]) -> Any:
    """Lists and dicts as JSON has them, with every text in them redacted."""
    if isinstance(value, Mapping):
        return {name: redact_tree(item, redact) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(item, redact) for item in value]
    return redact(value) if isinstance(value, str) else value


@lru_cache(maxsize=64)
def redactor(secrets: tuple[str, ...] = ()) -> Callable[[str], str]:
    """A function that redacts text, prepared once for the secrets of an instance: for every line that an engine prints."""
    known = _known(secrets)

    def redact(text: str) -> str:
        if known is not None:
            text = known.sub(REDACTED, text)
        for pattern in _IN_TEXT:
            text = pattern.sub(rf"\g<keep>{REDACTED}", text)
        return text

    return redact


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with known secrets, and what stands where secrets stand, replaced."""
    return redactor(tuple(secrets))(text)


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
    name, colon, content = value.partition(":")
    if colon and content.strip() and len(name) <= 64 and _HEADER_NAME.fullmatch(name.strip()):
        return f"{start}{equals}{name}: {REDACTED}"
    return redact_text(item, secrets)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name usually holds a secret (VLLM_API_KEY does; SSL_KEY_FILE names a file)."""
    return bool(_SECRET_NAME.search(name)) and not _KEY_FILES.search(name)


def redact_environment(environ: Mapping[str, str], secrets: Iterable[str] = ()) -> dict[str, str]:
    secrets = tuple(secrets)
    return {name: REDACTED if value and is_secret_name(name) else redact_text(value, secrets) for name, value in environ.items()}
