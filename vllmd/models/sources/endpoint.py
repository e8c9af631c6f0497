"""The address of a source, as a person writes it."""

from __future__ import annotations

from urllib.parse import urlsplit


def parsed(text: str) -> str | None:
    """The URL, https where nothing is said, without a slash at its end; '' for none. None where it is no such URL: then it is
    not to be shown either, since it may hold a password."""
    url = text if "://" in text or not text else f"https://{text}"
    try:
        parts = urlsplit(url)
        is_good = not url or (parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0)
    except ValueError:
        return None
    if not is_good or (url and ("@" in parts.netloc or parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url)):
        return None
    return url.rstrip("/")
