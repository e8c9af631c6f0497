"""Pure: from a URL to where to connect: host, port, and the proxy that the environment names for it.

Unlike urllib this takes the environment as a value, and refuses what is no plain http or https URL.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from vllmd.errors import ConfigError, SourceUnavailable

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """`authorization` is a secret."""

    host: str
    port: int
    tls: bool = False
    authorization: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """One kept connection serves all requests of one route."""

    tls: bool
    host: str
    port: int
    proxy: Proxy | None = None

    @property
    def authority(self) -> str:
        """HOST[:PORT], for people, the Host header and CONNECT."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.tls else "http"] else f"{host}:{self.port}"


def route(url: str, environ: Mapping[str, str]) -> Route:
    """SourceUnavailable for what is no URL that can be fetched; ConfigError for a proxy that is none."""
    parts = _split(url)
    tls, host, port = parts.scheme == "https", parts.hostname or "", parts.port or _PORTS[parts.scheme]
    return Route(tls, host, port, _proxy(parts.scheme, host, port, environ))


def target(url: str, through: Route) -> str:
    """What stands in the request line: a path, or for a proxy of plain http the whole URL."""
    parts = _split(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    path = path.replace(" ", "%20")
    return f"http://{through.authority}{path}" if through.proxy and not through.tls else path


def redirected(url: str, location: str) -> str:
    """Where a redirect leads; SourceUnavailable where it leads from https to http, or nowhere."""
    joined = urljoin(url, location)
    if urlsplit(url).scheme == "https" and urlsplit(joined).scheme != "https":
        what = f"{shown(url)} redirects from https to {shown(joined)}"
        raise SourceUnavailable("redirect_refused", what, "Refused: anybody on the way could give other bytes. Look who answers there.")
    _split(joined)
    return joined


def shown(url: str) -> str:
    """For people and logs: without the query (signatures), credentials and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(no URL)"
    text = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{parts.path}"
    return "".join(char if char.isprintable() else "?" for char in text)[:500]


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in _PORTS and bool(parts.hostname) and (parts.port is None or 0 < parts.port < 65536)
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(ord(char) < 33 and char != " " for char in url):
        raise SourceUnavailable("url_refused", f"the source names {shown(url)}, which is no URL to fetch from", "Look at its endpoint.")
    return parts


def _proxy(scheme: str, host: str, port: int, environ: Mapping[str, str]) -> Proxy | None:
    variable = next((name for name in _names(scheme, environ) if environ.get(name)), "")
    if not variable or _is_exempt(host, port, environ.get("no_proxy") or environ.get("NO_PROXY") or ""):
        return None
    url = environ[variable] if "://" in environ[variable] else f"http://{environ[variable]}"
    try:
        parts = urlsplit(url)
        number = parts.port or _PORTS[parts.scheme]
        name = parts.hostname or ""
    except (ValueError, KeyError):
        name, number = "", 0
    # Encryption within encryption has no socket of its own to give: https goes through a proxy that is spoken to in plain.
    if not name or parts.scheme not in _PORTS or parts.scheme == scheme == "https":
        raise ConfigError("proxy_refused", f"{variable} names no proxy that can be used for {scheme}", f"Set {variable} to http://HOST:PORT.")
    return Proxy(name, number, parts.scheme == "https", _authorization(parts))


def _names(scheme: str, environ: Mapping[str, str]) -> list[str]:
    """HTTP_PROXY is what a CGI script is given by the one who asks (a header "Proxy"): not believed there."""
    upper = [] if scheme == "http" and "REQUEST_METHOD" in environ else [f"{scheme.upper()}_PROXY"]
    return [f"{scheme}_proxy", *upper, "all_proxy", "ALL_PROXY"]


def _authorization(parts: SplitResult) -> str:
    if parts.username is None:
        return ""
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _is_exempt(host: str, port: int, exempt: str) -> bool:
    return any(_matches(host.lower(), port, entry.strip().lower()) for entry in exempt.split(",") if entry.strip())


def _matches(host: str, port: int, entry: str) -> bool:
    if entry == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass
    name, colon, number = entry.rpartition(":")
    if colon and number.isdigit() and ":" not in name:
        if int(number) != port:
            return False
        entry = name
    entry = entry.removeprefix("*").lstrip(".").strip("[]")
    return host == entry or host.endswith(f".{entry}")
