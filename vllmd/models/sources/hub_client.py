"""huggingface_hub as this program wants it: one question at a time, bounded in size and time, and nothing kept.

The library reads its environment when it is imported; what matters of that (endpoint, token, offline) is given to it here.
Its HTTP client is shared and has no deadline, so it gets one of ours: certificates as for the downloads, answers that end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllmd import __version__
from vllmd.errors import ConfigError, VllmdError
from vllmd.models.sources import hub_errors
from vllmd.models.sources.hub_errors import Place
from vllmd.models.transfer import tls

TIMEOUT_S = 30.0
"""For each step: a connection, and each wait for bytes."""
ANSWER_S = 90.0
"""For the whole of one answer."""
MAX_ANSWER_BYTES = 24 << 20
"""Of 50,000 files (more are not listed in one piece) each takes about 300 bytes."""


@contextmanager
def opened(place: Place, environ: Mapping[str, str]) -> Iterator[Any]:
    """An HfApi. What it raises inside becomes an error of our tree; no connection stays open behind it."""
    http = _http()
    from huggingface_hub import HfApi, close_session, constants, set_client_factory

    constants.HF_HUB_DISABLE_TELEMETRY = True
    secure = tls.context(environ)
    set_client_factory(lambda: _client(http, secure, place))
    try:
        yield HfApi(endpoint=place.endpoint, token=place.token or False, library_name="vllmd", library_version=__version__)
    except VllmdError:
        raise
    except Exception as error:
        # The library builds objects out of whatever JSON came: anything can be raised.
        raise hub_errors.of_exception(error, place, http) from error
    finally:
        close_session()


def _http() -> Any:
    """The HTTP library that this huggingface_hub is made on: httpx, or httpx2."""
    try:
        from huggingface_hub.utils import _http as library
    except ImportError as error:
        raise ConfigError("hub_library", f"huggingface_hub cannot be used: {error}", "Install vllmd again, with its dependencies.") from error
    found = vars(library).get("httpx2") or vars(library).get("httpx")
    if found is None:
        raise ConfigError("hub_library", "huggingface_hub is older than 1.0", "pip install 'huggingface_hub>=1.0' where vllmd is installed.")
    return found


def _client(http: Any, secure: Any, place: Place) -> Any:
    bounded = _bounded_stream(http, place)

    def bound(response: Any) -> None:
        # What is compressed could be a thousand times as long; it was not asked for.
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise hub_errors.unreadable(place, "it is compressed, which was not asked for")
        response.stream = bounded(response.stream)

    headers = {"Accept-Encoding": "identity"}
    return http.Client(verify=secure, timeout=TIMEOUT_S, follow_redirects=True, max_redirects=5, headers=headers, event_hooks={"response": [bound]})


def _bounded_stream(http: Any, place: Place) -> Any:
    class Bounded(http.SyncByteStream):  # type: ignore[misc]  # the library is known when it runs only
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            until, size = time.monotonic() + ANSWER_S, 0
            for part in self._stream:
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise hub_errors.unreadable(place, f"it is longer than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > until:
                    raise hub_errors.unreadable(place, f"it is not complete after {ANSWER_S:.0f} s")
                yield part

        def close(self) -> None:
            self._stream.close()

    return Bounded
