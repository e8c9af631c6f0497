"""Asks for bytes of a file: over a kept connection where there is one, through redirects, without telling secrets to strangers."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from vllmd.errors import PermissionMissing, SourceUnavailable
from vllmd.models.remote import Request
from vllmd.models.transfer.answers import REDIRECTS, Again
from vllmd.models.transfer.connection import Connection, Head, ProxyRefusal
from vllmd.models.transfer.routes import Route, redirected, route, shown, target
from vllmd.models.transfer.watch import Watch

MAX_REDIRECTS = 5
_HARMLESS = {"range", "user-agent", "accept"}
"""Headers that another host than the asked one may see. If-Match is not secret, but the other host's ETags are others."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`url` is where it came from, after redirects; `moved` whether that is another host."""

    connection: Connection
    head: Head
    url: str
    host: str
    moved: bool


class Client:
    """A thread's own: at most one connection is kept per route. `close` it."""

    def __init__(self, watch: Watch, secure: ssl.SSLContext, environ: Mapping[str, str]) -> None:
        self._watch, self._secure, self._environ = watch, secure, environ
        self._kept: dict[Route, Connection] = {}

    def close(self) -> None:
        for connection in self._kept.values():
            self._watch.gone(connection)
        self._kept.clear()

    def get(self, request: Request) -> Answer:
        """The first answer that is no redirect. Its body is still to be read; then `keep` or `drop` the connection.

        OSError and Again as the network does; SourceUnavailable for redirects that lead nowhere.
        """
        url, headers = request.url, dict(request.headers)
        origin = _place(url)
        seen = {url}
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._get(url, headers, moved=_place(url) != origin)
            location = answer.head.headers.get("location", "")
            if answer.head.status not in REDIRECTS or not location:
                return answer
            answer.connection.short_body(answer.head)
            self.keep(answer)
            url = redirected(url, location)
            if url in seen:
                raise SourceUnavailable("redirect_loop", f"{shown(request.url)} redirects in a circle, by way of {shown(url)}", "Look at the server.")
            seen.add(url)
            if _place(url) != origin:
                headers = {name: value for name, value in headers.items() if name.lower() in _HARMLESS}
        raise SourceUnavailable("redirect_loop", f"{shown(request.url)} redirects more than {MAX_REDIRECTS} times", "Look at the server.")

    def _get(self, url: str, headers: Mapping[str, str], *, moved: bool) -> Answer:
        way = route(url, self._environ)
        fixed = {"Host": way.authority, "Accept-Encoding": "identity"}
        if way.proxy and not way.tls and way.proxy.authorization:
            fixed["Proxy-Authorization"] = way.proxy.authorization
        given = {name: value for name, value in headers.items() if name.lower() not in ("host", "accept-encoding", "connection")}
        connection, head = self._asked(way, target(url, way), {**fixed, **given})
        return Answer(connection, head, url, way.authority, moved)

    def _asked(self, way: Route, path: str, headers: Mapping[str, str]) -> tuple[Connection, Head]:
        kept = self._kept.pop(way, None)
        if kept is not None:
            try:
                if kept.is_idle():
                    return kept, kept.ask("GET", path, headers)
            except (OSError, Again) as error:
                if kept.aborted:
                    self._watch.gone(kept)
                    raise Again(kept.aborted) from error
            except BaseException:
                self._watch.gone(kept)
                raise
            self._watch.gone(kept)  # the server closed it meanwhile, as it may: that is no failure
        connection = self._watch.made(way)
        try:
            connection.open(self._secure)
            return connection, connection.ask("GET", path, headers)
        except ProxyRefusal as error:
            self._watch.gone(connection)
            raise _proxy_refused(way, error.status) from error
        except (OSError, Again) as error:
            self._watch.gone(connection)
            raise (Again(connection.aborted) if connection.aborted else _named(error, way)) from error
        except BaseException:
            self._watch.gone(connection)
            raise

    def keep(self, answer: Answer) -> None:
        """Its body was read: the next request may use the connection, if it can be."""
        if answer.connection.is_reusable(answer.head):
            self._kept[answer.connection.route] = answer.connection
        else:
            self.drop(answer)

    def drop(self, answer: Answer) -> None:
        self._watch.gone(answer.connection)


def _place(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _named(error: OSError | Again, way: Route) -> Again:
    """The kernel and the resolver do not say whom they mean."""
    if isinstance(error, Again):
        return error
    through = f" (through the proxy {way.proxy.host}:{way.proxy.port})" if way.proxy else ""
    return Again(f"{way.authority}{through}: {error.strerror or error}")


def _proxy_refused(way: Route, status: int) -> Exception:
    where = f"{way.proxy.host}:{way.proxy.port}" if way.proxy else ""
    what = f"the proxy {where} answered {status} for {way.authority}"
    if status == 407:
        return PermissionMissing("proxy_refused", what, "It wants credentials: https_proxy=http://USER:PASSWORD@HOST:PORT.")
    return SourceUnavailable("proxy_refused", what, "Look at the proxy, or name the host in no_proxy.")
