"""A command line as it may be shown: quoted, cut, and without the secrets that stand on other people's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_SECRET_FLAG = re.compile(
    r"--?(api[-_]key|token|(access|api|hf)[-_]token|auth|authorization|password|secret|jwt|bearer)", re.IGNORECASE
)
_SECRET_TEXT = re.compile(r"((?:proxy-)?authorization|(?:set-)?cookie|x?-?api-key|bearer|\w*token)\s*[:=]", re.IGNORECASE)
HIDDEN = "<redacted>"
_LIMIT = 400


def shown(argv: Sequence[str]) -> str:
    """The command line for a report, at most 400 characters."""
    text = shlex.join(redacted(argv))
    return text if len(text) <= _LIMIT else text[: _LIMIT - 3] + "..."


def redacted(argv: Sequence[str]) -> list[str]:
    """Values of secret flags, in both forms, and headers that carry one, replaced. A title of one argument too."""
    if len(argv) == 1 and " " in argv[0]:
        return [" ".join(redacted(argv[0].split()))]
    found: list[str] = []
    hide_next = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        is_secret = _SECRET_FLAG.fullmatch(flag) is not None
        if hide_next:
            found.append(HIDDEN)
        elif is_secret and equals:
            found.append(f"{flag}={HIDDEN}")
        else:
            found.append(_SECRET_TEXT.sub(lambda match: match[0] + HIDDEN + "\0", word).partition("\0")[0])
        hide_next = is_secret and not equals and not hide_next
    return found
